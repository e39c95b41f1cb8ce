"""Architectures and the modules that implement them; a new model is one module and one entry here.

A model class is made as ``Model(config, dtype=..., rngs=...)``, is called as `Llama.__call__` is, and has the static
method `checkpoint_name`.
"""

import importlib
from typing import Any

# Names rather than classes, so that reading a config does not import every model.
ARCHITECTURES = {"LlamaForCausalLM": ("lamina_jax.models.llama", "Llama")}


def model_class(architecture: str) -> Any:
    """The `nnx.Module` subclass for a name that `architectures` in a config.json may hold; KeyError if none."""
    module, name = ARCHITECTURES[architecture]
    return getattr(importlib.import_module(module), name)
