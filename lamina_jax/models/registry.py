"""Architectures and the modules that implement them; a new model is one module and one entry here.

A model class is a `lamina_jax.models.base.DecoderModel`, which also reads and writes what is its own in config.json.
"""

import importlib
from typing import Any

# Names rather than classes, so that reading a config does not import every model.
ARCHITECTURES = {
    "LlamaForCausalLM": ("lamina_jax.models.llama", "Llama"),
    "MistralForCausalLM": ("lamina_jax.models.mistral", "Mistral"),
    "Qwen2ForCausalLM": ("lamina_jax.models.qwen2", "Qwen2"),
    "Qwen3ForCausalLM": ("lamina_jax.models.qwen3", "Qwen3"),
    "Gemma2ForCausalLM": ("lamina_jax.models.gemma2", "Gemma2"),
}


def model_class(architecture: str) -> Any:
    """The `nnx.Module` subclass for a name that `architectures` in a config.json may hold; KeyError if none."""
    module, name = ARCHITECTURES[architecture]
    return getattr(importlib.import_module(module), name)
