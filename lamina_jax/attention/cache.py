"""The paged KV cache: a pool of pages per layer, and the per-step description of who owns which."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int

from lamina_jax.attention.quantization import AUTO, SCALE_DTYPE, is_quantized, quantize, stored_dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedCache:
    """Keys and values of every layer, in pages; one (page, head) is contiguous, as kernels like to stream it.

    Where they are quantized (`lamina_jax.attention.quantization`) they are 1-byte numbers, times `scales`.
    """

    # JAX makes objects of this class from shapes and placeholders too, which a type checker would refuse.
    __no_type_check__ = True

    k: Float[Array, "layers pages num_kv_heads page_size head_dim"]
    v: Float[Array, "layers pages num_kv_heads page_size head_dim"]
    scales: Float[Array, "layers pages num_kv_heads 2 page_size"] | None = None
    """float32, of the keys and of the values of a page; None if nothing is quantized."""

    @classmethod
    def zeros(
        cls,
        *,
        num_layers: int,
        num_pages: int,
        num_kv_heads: int,
        page_size: int,
        head_dim: int,
        dtype: DTypeLike,
        kv_cache_dtype: str = AUTO,
        device: Any = None,
    ) -> "PagedCache":
        """An empty cache for keys and values of `dtype`, kept as `kv_cache_dtype` says (`quantization.STORED`), on a
        `jax.Device`; None is JAX's default.

        Raises:
            ValueError: there is no such kv_cache_dtype.
        """
        stored = stored_dtype(kv_cache_dtype, dtype)
        places = (num_layers, num_pages, num_kv_heads, page_size)
        return cls(
            k=jnp.zeros((*places, head_dim), stored, device=device),
            v=jnp.zeros((*places, head_dim), stored, device=device),
            scales=jnp.zeros((*places[:3], 2, page_size), SCALE_DTYPE, device=device) if is_quantized(stored) else None,
        )

    @property
    def nbytes(self) -> int:
        """Of all pages, scales included; also of a cache of shapes."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.k.shape[3]

    @property
    def num_pages(self) -> int:
        """Pages of one layer."""
        return self.k.shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTables:
    """Where the sequences of one step stand. Rows that only pad a bucket have ``num_new == 0``."""

    # JAX makes objects of this class from shapes and placeholders too, which a type checker would refuse.
    __no_type_check__ = True

    context_lens: Int[Array | np.ndarray, " batch"]
    """Tokens of each sequence that are in the cache before this step."""
    num_new: Int[Array | np.ndarray, " batch"]
    """How many of the step's `tokens` columns are real; the rest are padding and never enter the cache."""
    block_tables: Int[Array | np.ndarray, "batch max_pages"]
    """Page numbers of each sequence in order; entries past its last page are ignored."""

    @classmethod
    def shapes(cls, batch: int, max_pages: int) -> "StepTables":
        """The shapes of a bucket's tables, to compile for."""
        names = {"context_lens": (batch,), "num_new": (batch,), "block_tables": (batch, max_pages)}
        fields: Any = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in names.items()}
        return cls(**fields)


def append(
    cache: PagedCache,
    layer: Int[Array, ""],
    k: Float[Array, "batch tokens num_kv_heads head_dim"],
    v: Float[Array, "batch tokens num_kv_heads head_dim"],
    tables: StepTables,
) -> PagedCache:
    """Writes the step's new keys and values behind what each sequence holds, quantized if the cache is. In place where
    XLA may reuse `cache`."""
    tokens = k.shape[1]
    column = jnp.arange(tokens, dtype=jnp.int32)[None, :]
    position = tables.context_lens[:, None] + column
    last = tables.block_tables.shape[1] - 1
    page = jnp.take_along_axis(tables.block_tables, jnp.minimum(position // cache.page_size, last), axis=1)
    # A page number past the end makes the scatter drop the row: padding is never written anywhere.
    page = jnp.where(column < tables.num_new[:, None], page, cache.num_pages)
    offset = position % cache.page_size

    def put(pages: Array, new: Array) -> Array:
        return pages.at[layer, page, :, offset].set(new.astype(pages.dtype), mode="drop")

    if cache.scales is None:
        return PagedCache(k=put(cache.k, k), v=put(cache.v, v))
    (k, of_k), (v, of_v) = quantize(k, cache.k.dtype), quantize(v, cache.v.dtype)
    scales = cache.scales.at[layer, page, :, :, offset].set(jnp.stack([of_k, of_v], axis=-1), mode="drop")
    return PagedCache(k=put(cache.k, k), v=put(cache.v, v), scales=scales)
