"""What tests, benchmarks and examples share: tiny checkpoints that need no download."""

from lamina_jax.testing.tiny import TINY_CONFIGS, byte_tokenizer, write_tiny_checkpoint

__all__ = ["TINY_CONFIGS", "byte_tokenizer", "write_tiny_checkpoint"]
