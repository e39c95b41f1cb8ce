"""What tests, benchmarks and examples share: tiny checkpoints that need no download."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina_jax.testing.tiny import TINY_CONFIGS, byte_tokenizer, write_tiny_checkpoint

__all__ = ["TINY_CONFIGS", "byte_tokenizer", "write_tiny_checkpoint"]


def __getattr__(name: str):
    # Imported when first used: set-up of machines needs none of them, nor JAX, which takes a machine 20 s to import.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lamina_jax.testing import tiny

    return getattr(tiny, name)
