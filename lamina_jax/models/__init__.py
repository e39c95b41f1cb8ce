"""Models, their configs, and the checkpoints they are loaded from."""

from lamina_jax.models.base import DecoderModel
from lamina_jax.models.checkpoint import GenerationDefaults, load_generation_config, load_model
from lamina_jax.models.config import ModelConfig, RopeScaling
from lamina_jax.models.fields import CheckpointError

__all__ = [
    "CheckpointError",
    "DecoderModel",
    "GenerationDefaults",
    "ModelConfig",
    "RopeScaling",
    "load_generation_config",
    "load_model",
]
