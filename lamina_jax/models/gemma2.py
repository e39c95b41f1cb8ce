"""Gemma 2: bounded scores and logits, and a window in every other layer (arXiv:2408.00118)."""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from lamina_jax.models.config import ModelConfig
from lamina_jax.models.fields import Fields
from lamina_jax.models.llama import MLP, Layer, Llama, RMSNorm
from lamina_jax.models.mapping import read_attention_bias, read_windows, write_windows


class Gemma2Norm(RMSNorm):
    """RMSNorm whose weights are stored less 1, and multiplied in float32."""

    def __init__(self, size: int, *, eps: float, dtype: DTypeLike):
        super().__init__(size, eps=eps, dtype=dtype)
        self.scale[...] = jnp.zeros((size,), dtype)

    def __call__(self, x: Float[Array, "*places size"]) -> Float[Array, "*places size"]:
        return (self.normed(x) * (1.0 + self.along(x).astype(jnp.float32))).astype(x.dtype)


class Gemma2MLP(MLP):
    """GeGLU feed-forward network (arXiv:2002.05202), GELU by its tanh approximation."""

    activation = staticmethod(functools.partial(jax.nn.gelu, approximate=True))


class Gemma2Layer(Layer):
    """A layer whose attention and feed-forward network have norms before and behind."""

    mlp_class = Gemma2MLP
    norm_class = Gemma2Norm

    def __init__(self, config: ModelConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(config, layer, dtype=dtype, rngs=rngs)
        self.pre_feedforward_layernorm = Gemma2Norm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.post_feedforward_layernorm = Gemma2Norm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "batch tokens hidden"],
        cos: Float32[Array, "batch tokens half"],
        sin: Float32[Array, "batch tokens half"],
    ) -> Float[Array, "batch tokens hidden"]:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), cos, sin))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Gemma2(Llama):
    """A Gemma 2 decoder. Where `layer_types` says nothing else, the first, third, .. layer has the window."""

    CONFIG_DEFAULTS: ClassVar = {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
    layer_class = Gemma2Layer

    def embedded(self, tokens: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens hidden"]:
        x = super().embedded(tokens)
        # The factor is rounded to the dtype first, as it was in training: in bfloat16, 55.5 and not 55.4256.
        x = x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        # The first layer adds to this; whether XLA makes that one multiply-add would depend on where the model is cut.
        return jax.lax.optimization_barrier(x)

    def logits(self, x: Float[Array, "batch tokens hidden"]) -> Float32[Array, "batch tokens vocab"]:
        logits, cap = super().logits(x), self.config.logit_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    @staticmethod
    def read_config(fields: Fields) -> dict[str, Any]:
        # `hidden_act` is there too in old files, and means nothing.
        fields.only("hidden_activation", "gelu_pytorch_tanh")
        fields.only("use_bidirectional_attention", False)
        return {
            **read_attention_bias(fields),
            **read_windows(fields, lambda i: i % 2 == 0),
            "query_pre_attn_scalar": fields.positive_int("query_pre_attn_scalar"),
            "attention_soft_cap": fields.positive_float_or_none("attn_logit_softcapping"),
            "logit_soft_cap": fields.positive_float_or_none("final_logit_softcapping"),
        }

    @staticmethod
    def write_config(config: ModelConfig) -> dict[str, Any]:
        return {
            "model_type": "gemma2",
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": config.qkv_bias,
            "query_pre_attn_scalar": config.query_pre_attn_scalar or config.head_dim,
            "attn_logit_softcapping": config.attention_soft_cap,
            "final_logit_softcapping": config.logit_soft_cap,
            **write_windows(config),
        }
