"""Tensor parallelism: a model divided among the devices of one mesh axis (Shoeybi et al., arXiv:1909.08053).

Every device holds whole heads, whole columns of the feed-forward's inner layer and whole words of the vocabulary. It
computes with a model of its own, whose config is `local_config`, and adds its results to the others' where the sum is
over what is divided. So a model uses `InputDividedLinear` where heads or the inner layer end, and `embed_words` and
`gather_words` around its vocabulary. They are as the undivided ones where a model is not divided.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lamina_jax.models.base import ParameterPath
from lamina_jax.models.config import ModelConfig

_axis: contextvars.ContextVar[str | None] = contextvars.ContextVar("model axis", default=None)

_OUTPUT_DIVIDED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
"""Projections of which each device makes some of the output channels."""
_INPUT_DIVIDED = ("o_proj", "down_proj")
"""Projections of which each device has some of the input channels; the outputs are summed, the bias is whole."""


@contextlib.contextmanager
def divided_over(axis: str) -> Iterator[None]:
    """Models that are traced in this context are one device's part, and meet the others over this mesh axis."""
    token = _axis.set(axis)
    try:
        yield
    finally:
        _axis.reset(token)


def local_config(config: ModelConfig, num_devices: int) -> ModelConfig:
    """The shape of one device's part.

    Raises:
        ValueError: something does not divide evenly; says what.
    """
    divided = ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size")
    odd = [f"{name}={getattr(config, name)}" for name in divided if getattr(config, name) % num_devices]
    if odd:
        raise ValueError(f"expected {num_devices} model devices to divide {', '.join(odd)}; use another number of them")
    return dataclasses.replace(config, **{name: getattr(config, name) // num_devices for name in divided})


def partition_spec(path: ParameterPath, axis: str) -> PartitionSpec:
    """How the parameter at `path` in a module is divided along a mesh axis; whole on each device if it is not."""
    *owner, leaf = path
    layer = owner[-1] if owner else None
    if layer in _OUTPUT_DIVIDED:
        return PartitionSpec(None, axis) if leaf == "kernel" else PartitionSpec(axis)
    if layer in _INPUT_DIVIDED and leaf == "kernel":
        return PartitionSpec(axis)
    if layer == "embed_tokens":
        return PartitionSpec(axis)
    return PartitionSpec()


class InputDividedLinear(nnx.Linear):
    """A projection of which each device may have some of the input channels."""

    def __call__(self, x: Float[Array, "*places in_features"]) -> Float[Array, "*places out_features"]:
        axis = _axis.get()
        if axis is None:
            return super().__call__(x)
        y = jax.lax.psum(jnp.matmul(x, self.kernel[...]), axis)
        # Every device has the whole bias, and it counts once.
        return y if self.bias is None else y + self.bias[(None,) * (y.ndim - 1)]


def embed_words(embed: nnx.Embed, tokens: Int[Array, "*places"]) -> Float[Array, "*places hidden"]:
    """The rows of an embedding of which each device may have some."""
    axis = _axis.get()
    if axis is None:
        return embed(tokens)
    local = tokens - jax.lax.axis_index(axis).astype(tokens.dtype) * embed.num_embeddings
    here = (local >= 0) & (local < embed.num_embeddings)
    rows = embed(jnp.where(here, local, 0))
    return jax.lax.psum(jnp.where(here[..., None], rows, jnp.zeros((), rows.dtype)), axis)


def gather_words(logits: Float[Array, "*places local"]) -> Float[Array, "*places vocab"]:
    """The logits of all devices' words, on each."""
    axis = _axis.get()
    return logits if axis is None else jax.lax.all_gather(logits, axis, axis=logits.ndim - 1, tiled=True)
