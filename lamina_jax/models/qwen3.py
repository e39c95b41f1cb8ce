"""Qwen3 (dense): Qwen2 with norms of q and k instead of their biases (arXiv:2505.09388)."""

from typing import Any, ClassVar

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lamina_jax.models.config import ModelConfig
from lamina_jax.models.fields import Fields
from lamina_jax.models.llama import Attention, Layer, Llama, RMSNorm
from lamina_jax.models.mapping import read_attention_bias
from lamina_jax.models.qwen2 import Qwen2


class Qwen3Attention(Attention):
    """Attention with each head's q and k normed before their rotary embedding, by weights that heads share."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(config, layer, dtype=dtype, rngs=rngs)
        self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, dtype=dtype)
        self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, dtype=dtype)

    def queries(self, x: Float[Array, "batch tokens hidden"]) -> Float[Array, "batch tokens num_heads head_dim"]:
        return self.q_norm(super().queries(x))

    def keys(self, x: Float[Array, "batch tokens hidden"]) -> Float[Array, "batch tokens num_kv_heads head_dim"]:
        return self.k_norm(super().keys(x))


class Qwen3Layer(Layer):
    """One layer."""

    attention_class = Qwen3Attention


class Qwen3(Llama):
    """A Qwen3 decoder; windows as in Qwen2, biases (`attention_bias`) as in LLaMA."""

    CONFIG_DEFAULTS: ClassVar = {**Qwen2.CONFIG_DEFAULTS, "head_dim": 128}
    layer_class = Qwen3Layer

    @staticmethod
    def read_config(fields: Fields) -> dict[str, Any]:
        return {**Qwen2.read_config(fields), **read_attention_bias(fields)}

    @staticmethod
    def write_config(config: ModelConfig) -> dict[str, Any]:
        return {**Qwen2.write_config(config), "model_type": "qwen3", "attention_bias": config.qkv_bias}
