"""The kernel in plain JAX: any XLA device runs it, and every other kernel is compared with it."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Int, Shaped

from lamina_jax.attention.cache import PagedCache, StepTables
from lamina_jax.attention.kernels.base import AttentionKernel
from lamina_jax.attention.merge import Partial
from lamina_jax.attention.params import LayerParams


class XlaKernel(AttentionKernel):
    """Gathers a sequence's pages into one array and attends over it; reads are O(max_pages), not O(length)."""

    platforms: ClassVar[tuple[str, ...]] = ("cpu", "cuda", "rocm", "tpu")

    def attend_cached(self, q, cache: PagedCache, layer, tables: StepTables, params: LayerParams) -> Partial:
        k = _gather(cache.k, layer, tables.block_tables)
        v = _gather(cache.v, layer, tables.block_tables)
        k_scales = v_scales = None
        if cache.scales is not None:
            scales = jnp.swapaxes(cache.scales, 3, 4)
            k_scales, v_scales = jnp.moveaxis(_gather(scales, layer, tables.block_tables), (3, 1), (0, 3))
            k, v = k.astype(q.dtype), v.astype(weights_dtype(q.dtype))
        context_lens = jnp.asarray(tables.context_lens)[:, None]
        key = jnp.arange(k.shape[1], dtype=jnp.int32)[None, :]
        query = context_lens + jnp.arange(q.shape[1], dtype=jnp.int32)[None, :]
        cached = (key < context_lens)[:, None, :]
        mask = cached & _in_window(query, key, params)
        return Partial.of_scores(_scores(q, k, params, mask=mask, k_scales=k_scales), v, v_scales)

    def attend_new(self, q, k, v, params: LayerParams) -> Partial:
        token = jnp.arange(q.shape[1], dtype=jnp.int32)[None, :]
        causal = token[:, :, None] >= token[:, None, :]
        return Partial.of_scores(_scores(q, k, params, mask=causal & _in_window(token, token, params)), v)


def weights_dtype(dtype: DTypeLike) -> np.dtype:
    """What weights times the scales of a quantized cache are rounded to before they are multiplied by its values, in a
    model of `dtype`. Such small numbers leave float16's range; bfloat16 has that of float32."""
    return jnp.dtype("bfloat16" if jnp.dtype(dtype) == jnp.float16 else dtype)


def _in_window(
    query: Int[Array, "rows tokens"], key: Int[Array, "1 keys"], params: LayerParams
) -> Bool[Array, "rows tokens keys"]:
    """Whether the key at a position is near enough to be seen from the query's; whether it comes before is not asked.

    Sequences start at 0, so that without a window nothing is too far."""
    return query[:, :, None] - key[:, None, :] < params.window


def _gather(
    pages: Array, layer: Array, block_tables: Array | np.ndarray
) -> Shaped[Array, "batch keys num_kv_heads head_dim"]:
    found = pages[layer, block_tables]
    batch, max_pages, num_kv_heads, page_size, head_dim = found.shape
    return jnp.moveaxis(found, 2, 3).reshape(batch, max_pages * page_size, num_kv_heads, head_dim)


def _scores(
    q: Array,
    k: Array,
    params: LayerParams,
    mask: Bool[Array, "rows tokens keys"],
    k_scales: Float[Array, "batch num_kv_heads keys"] | None = None,
) -> Float[Array, "batch num_kv_heads group tokens keys"]:
    batch, tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    grouped = q.reshape(batch, tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    if k_scales is not None:
        scores = scores * k_scales[:, :, None, None]
    # Rounded here and nowhere else: a fusion that computes exp(score * scale - maximum) may contract it to one
    # multiply-add, and whether there is such a fusion depends on the program around the kernel.
    scores = jax.lax.optimization_barrier(scores * params.scale)
    if params.soft_cap is not None:
        scores = _capped(scores, params.soft_cap)
    return jnp.where(mask[:, None, None], scores, -jnp.inf)


def _capped(scores: Array, soft_cap: Array) -> Array:
    # A cap that XLA knows, as in the unsplit run, it would make a multiplication by the reciprocal.
    soft_cap = jax.lax.optimization_barrier(soft_cap)
    capped = soft_cap * jnp.tanh(scores / soft_cap)
    return jax.lax.optimization_barrier(jnp.where(jnp.isinf(soft_cap), scores, capped))
