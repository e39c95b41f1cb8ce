"""lamina_jax: decode large language models with attention and everything else on different devices."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina_jax.engine.llm import LLM
    from lamina_jax.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
    from lamina_jax.engine.sampling_params import SamplingParams
    from lamina_jax.runtime.errors import WorkerError

# Imported when first used: an attention worker needs none of them, and starts faster without.
_HOMES = {
    "LLM": "lamina_jax.engine.llm",
    "CompletionOutput": "lamina_jax.engine.outputs",
    "RequestMetrics": "lamina_jax.engine.outputs",
    "RequestOutput": "lamina_jax.engine.outputs",
    "SamplingParams": "lamina_jax.engine.sampling_params",
    "WorkerError": "lamina_jax.runtime.errors",
}

__all__ = ["LLM", "CompletionOutput", "RequestMetrics", "RequestOutput", "SamplingParams", "WorkerError"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
