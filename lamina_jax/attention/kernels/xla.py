"""The kernel in plain JAX: any XLA device runs it, and every other kernel is compared with it."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lamina_jax.attention.cache import PagedCache, StepTables
from lamina_jax.attention.kernels.base import AttentionKernel
from lamina_jax.attention.merge import Partial


class XlaKernel(AttentionKernel):
    """Gathers a sequence's pages into one array and attends over it; reads are O(max_pages), not O(length)."""

    def attend_cached(self, q, cache: PagedCache, layer, tables: StepTables, scale) -> Partial:
        k = _gather(cache.k, layer, tables.block_tables)
        v = _gather(cache.v, layer, tables.block_tables)
        cached = jnp.arange(k.shape[1], dtype=jnp.int32)[None, :] < tables.context_lens[:, None]
        return Partial.of_scores(_scores(q, k, scale, mask=cached[:, None, None, None, :]), v)

    def attend_new(self, q, k, v, scale) -> Partial:
        causal = jnp.tril(jnp.ones((1, 1, 1, q.shape[1], q.shape[1]), bool))
        return Partial.of_scores(_scores(q, k, scale, mask=causal), v)


def _gather(
    pages: Array, layer: Array, block_tables: Array | np.ndarray
) -> Float[Array, "batch keys num_kv_heads head_dim"]:
    found = pages[layer, block_tables]
    batch, max_pages, num_kv_heads, page_size, head_dim = found.shape
    return jnp.moveaxis(found, 2, 3).reshape(batch, max_pages * page_size, num_kv_heads, head_dim)


def _scores(q: Array, k: Array, scale: Array, mask: Array) -> Float[Array, "batch num_kv_heads group tokens keys"]:
    batch, tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    grouped = q.reshape(batch, tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    # Rounded here and nowhere else: a fusion that computes exp(score * scale - maximum) may contract it to one
    # multiply-add, and whether there is such a fusion depends on the program around the kernel.
    return jnp.where(mask, jax.lax.optimization_barrier(scores * scale), -jnp.inf)
