"""LLaMA as a Flax NNX module. Attention happens behind `attend`; nothing here knows of caches or workers.

Attributes are named as in the Hugging Face checkpoints, so that `checkpoint_name` is a rule and not a table. Models
that differ from LLaMA in parts subclass those parts and name them in the class attributes `*_class`.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from lamina_jax.attention.attend import attend
from lamina_jax.models.base import DecoderModel, ParameterPath
from lamina_jax.models.config import ModelConfig
from lamina_jax.models.fields import Fields
from lamina_jax.models.mapping import read_attention_bias
from lamina_jax.models.parallel import InputDividedLinear, embed_words, gather_words


class RMSNorm(nnx.Module):
    """Root-mean-square norm, computed in float32 (arXiv:1910.07467)."""

    def __init__(self, size: int, *, eps: float, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*places size"]) -> Float[Array, "*places size"]:
        return self.normed(x).astype(x.dtype) * self.along(x)

    def normed(self, x: Float[Array, "*places size"]) -> Float32[Array, "*places size"]:
        """`x` with a root mean square of 1."""
        x32 = x.astype(jnp.float32)
        return x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)

    def along(self, x: Float[Array, "*places size"]) -> Float[Array, "*ones size"]:
        """The weights, with as many axes as `x` has."""
        return self.scale[(None,) * (x.ndim - 1)]


class Attention(nnx.Module):
    """Projections and rotary embedding around `attend`, of the layer with number `layer`."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        self.params = config.attend_params(layer)
        hidden, q, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        options = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.q_proj = nnx.Linear(hidden, q, use_bias=config.qkv_bias, **options)
        self.k_proj = nnx.Linear(hidden, kv, use_bias=config.qkv_bias, **options)
        self.v_proj = nnx.Linear(hidden, kv, use_bias=config.qkv_bias, **options)
        self.o_proj = InputDividedLinear(q, hidden, use_bias=config.o_bias, **options)

    def __call__(
        self,
        x: Float[Array, "batch tokens hidden"],
        cos: Float32[Array, "batch tokens half"],
        sin: Float32[Array, "batch tokens half"],
    ) -> Float[Array, "batch tokens hidden"]:
        # q comes first: it can travel to the attention worker while k and v are still being computed.
        q = rotate(self.queries(x), cos, sin)
        k = rotate(self.keys(x), cos, sin)
        v = self.heads(self.v_proj(x))
        out = attend(q, k, v, **dataclasses.asdict(self.params))
        return self.o_proj(out.reshape(*out.shape[:2], -1))

    def queries(self, x: Float[Array, "batch tokens hidden"]) -> Float[Array, "batch tokens num_heads head_dim"]:
        """Queries before their rotary embedding."""
        return self.heads(self.q_proj(x))

    def keys(self, x: Float[Array, "batch tokens hidden"]) -> Float[Array, "batch tokens num_kv_heads head_dim"]:
        """Keys before their rotary embedding."""
        return self.heads(self.k_proj(x))

    def heads(self, x: Float[Array, "batch tokens channels"]) -> Float[Array, "batch tokens heads head_dim"]:
        """Channels divided among heads."""
        return x.reshape(*x.shape[:2], -1, self.head_dim)


class MLP(nnx.Module):
    """SwiGLU feed-forward network (arXiv:2002.05202)."""

    activation = staticmethod(jax.nn.silu)

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        hidden, inner = config.hidden_size, config.intermediate_size
        options = {"use_bias": config.mlp_bias, "dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.gate_proj = nnx.Linear(hidden, inner, **options)
        self.up_proj = nnx.Linear(hidden, inner, **options)
        self.down_proj = InputDividedLinear(inner, hidden, **options)

    def __call__(self, x: Float[Array, "batch tokens hidden"]) -> Float[Array, "batch tokens hidden"]:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    """One pre-norm transformer layer, with number `layer`."""

    attention_class: ClassVar[type[Attention]] = Attention
    mlp_class: ClassVar[type[MLP]] = MLP
    norm_class: ClassVar[type[RMSNorm]] = RMSNorm

    def __init__(self, config: ModelConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.input_layernorm = self.norm_class(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.self_attn = self.attention_class(config, layer, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = self.norm_class(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = self.mlp_class(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch tokens hidden"],
        cos: Float32[Array, "batch tokens half"],
        sin: Float32[Array, "batch tokens half"],
    ) -> Float[Array, "batch tokens hidden"]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(DecoderModel):
    """A LLaMA decoder (arXiv:2302.13971; arXiv:2407.21783 for grouped heads and RoPE scaling).

    ``nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=nnx.Rngs(0)))`` builds one that has shapes only.

    Args:
        config: the model's shape.
        dtype: dtype of weights and activations. Norms, RoPE and logits are computed in float32 all the same.
        rngs: source of the initial weights, drawn as Flax's layers draw them.
    """

    layer_class: ClassVar[type[Layer]] = Layer

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.layers = nnx.List([self.layer_class(config, i, dtype=dtype, rngs=rngs) for i in range(config.num_layers)])
        self.norm = self.layer_class.norm_class(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(
                config.hidden_size, config.vocab_size, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs
            )

    def hidden_states(
        self, tokens: Int[Array, "batch tokens"], positions: Int[Array, "batch tokens"]
    ) -> Float[Array, "batch tokens hidden"]:
        cos, sin = rope_angles(positions, self.config)
        x = self.embedded(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def embedded(self, tokens: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens hidden"]:
        """What the first layer is given."""
        return embed_words(self.embed_tokens, tokens)

    def logits(self, x: Float[Array, "batch tokens hidden"]) -> Float32[Array, "batch tokens vocab"]:
        if self.config.tie_word_embeddings:
            table, axis = self.embed_tokens.embedding[...], 1
        else:
            table, axis = self.lm_head.kernel[...], 0
        logits = jax.lax.dot_general(x, table, (((2,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
        return gather_words(logits)

    @staticmethod
    def checkpoint_name(path: ParameterPath) -> str:
        *owner, leaf = path
        prefix = [] if owner[0] == "lm_head" else ["model"]
        return ".".join([*prefix, *map(str, owner), "bias" if leaf == "bias" else "weight"])

    @staticmethod
    def read_config(fields: Fields) -> dict[str, Any]:
        fields.only("hidden_act", "silu")
        return {**read_attention_bias(fields), "mlp_bias": bool(fields.boolean("mlp_bias"))}

    @staticmethod
    def write_config(config: ModelConfig) -> dict[str, Any]:
        return {
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": config.qkv_bias,
            "mlp_bias": config.mlp_bias,
        }


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each pair of a head's channels, float32 [head_dim // 2].

    RoPE is arXiv:2104.09864; the scaling is Meta's `apply_scaling` of LLaMA 3.1, as transformers'
    `_compute_llama3_parameters` also has it.
    """
    frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is not None:
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = np.clip(keep, 0, 1)
        frequencies = keep * frequencies + (1 - keep) * frequencies / scaling.factor
    return frequencies.astype(np.float32)


def rope_angles(
    positions: Int[Array, "batch tokens"], config: ModelConfig
) -> tuple[Float32[Array, "batch tokens half"], Float32[Array, "batch tokens half"]]:
    """Cosine and sine of every pair's angle at each position; half = head_dim // 2."""
    angles = positions[:, :, None].astype(jnp.float32) * rope_frequencies(config)[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "batch tokens heads head_dim"],
    cos: Float32[Array, "batch tokens half"],
    sin: Float32[Array, "batch tokens half"],
) -> Float[Array, "batch tokens heads head_dim"]:
    """Rotary embedding; channel i is paired with channel i + half, as in the Hugging Face checkpoints."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
