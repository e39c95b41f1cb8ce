"""Paged attention on Hopper GPUs: what the kernel of `mosaic_sm90` can do, how its work is split, and put together.

Apart from that file so that nobody imports Pallas who does not use it.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from lamina_jax.attention.cache import PagedCache, StepTables
from lamina_jax.attention.kernels.base import KernelTarget
from lamina_jax.attention.kernels.xla import XlaKernel, weights_dtype
from lamina_jax.attention.merge import Partial
from lamina_jax.attention.params import LayerParams
from lamina_jax.attention.quantization import AUTO, STORED, is_quantized, scale_bytes, stored_dtype

BLOCK = 64
"""Keys of one step of the kernel: the rows of one tensor core instruction."""
_MOST_ROWS = 64
"""Queries of a thread block at most, if head_dim is 128; more would not fit in registers."""
_MOST_QUANTIZED_ROWS = 56
"""The same for a quantized cache, whose widened numbers are in registers too."""
_MOST_SPLIT = 16384
"""Tokens of a split at most."""
_LEAST_SPLIT = 512
"""Tokens of a split at least: fewer, and starting a thread block costs more than what it streams."""
_WAVES = 4
"""Times that all thread blocks of the device should be filled: evens out contexts of different length."""
_BLOCKS_PER_SM = 2
_SHARED_BYTES = 96 << 10
"""Shared memory for keys and values of one thread block, so that two fit in the 227 KB of a multiprocessor."""
_MOST_SHARED_BYTES = 192 << 10
"""The same where a thread block has to have the multiprocessor to itself."""
_LEAST_STAGES = 3
_LEAST_PAGE = 8
"""Tokens. Eight rows are the unit in which shared memory is arranged for the tensor core."""
_LEAST_QUANTIZED_PAGE = 32
"""Tokens. Their scales are 128 bytes, the alignment in shared memory that the copy engine asks for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MosaicKernel(XlaKernel):
    """`attend_cached` on a Hopper GPU; `attend_new`, which is tiny, is the plain kernel's.

    bfloat16 or float16, with a cache of the same or a quantized one; head_dim a multiple of 64 up to 256; page_size a
    power of two of at least 8, or 32 if the cache is quantized. Any group, any number of new tokens, windows and soft
    caps. Pages outside the window are not read.
    """

    platforms: ClassVar[tuple[str, ...]] = ("cuda",)

    interpret: Any = None
    """An `InterpretGPUParams` of jax.experimental.pallas.mosaic_gpu, for tests: the kernel runs on a CPU, slowly, with
    simulated shared memory and barriers."""
    split_tokens: int | None = None
    """Tokens of context per thread block, a multiple of 64; None chooses by the shape of the step."""
    num_multiprocessors: int = 132
    """Of the device; only the choice of `split_tokens` depends on it. 132 is an H100 or H200, 78 an H20."""

    @classmethod
    def on(cls, device: Any) -> "MosaicKernel":
        return cls(num_multiprocessors=device.core_count)

    def __post_init__(self) -> None:
        if self.split_tokens is not None and (self.split_tokens < BLOCK or self.split_tokens % BLOCK):
            raise ValueError(f"split_tokens must be a positive multiple of {BLOCK}, got {self.split_tokens}.")

    @classmethod
    def check(cls, target: KernelTarget) -> None:
        super().check(target)
        if target.compute_capability is not None and not target.compute_capability.startswith("9."):
            raise ValueError(
                "The attention kernel 'mosaic' needs a Hopper GPU (compute capability 9.0), got one of "
                f"{target.compute_capability}; use attention_kernel='xla'."
            )
        if target.dtype not in ("bfloat16", "float16"):
            raise ValueError(
                f"The attention kernel 'mosaic' needs bfloat16 or float16, got {target.dtype}; set dtype, or use "
                "attention_kernel='xla'."
            )
        if target.head_dim not in (64, 128, 192, 256):
            raise ValueError(
                f"The attention kernel 'mosaic' needs a head_dim of 64, 128, 192 or 256, got {target.head_dim}; "
                "use attention_kernel='xla'."
            )
        quantized = is_quantized(stored_dtype(target.kv_cache_dtype, target.dtype))
        least = _LEAST_QUANTIZED_PAGE if quantized else _LEAST_PAGE
        if target.page_size < least or target.page_size & (target.page_size - 1):
            needed = f"needs, for a KV cache of {target.kv_cache_dtype}," if quantized else "needs"
            raise ValueError(
                f"The attention kernel 'mosaic' {needed} a page_size that is a power of two of at least {least}, got "
                f"{target.page_size}; set page_size, or use attention_kernel='xla'."
            )

    def attend_cached(self, q, cache: PagedCache, layer, tables: StepTables, params: LayerParams) -> Partial:
        plan = self._plan(q, cache, tables)
        # Imported here because it takes as long as the rest of a worker's imports together.
        from lamina_jax.attention.kernels import mosaic_sm90

        parts = mosaic_sm90.attend_splits(plan, self.interpret, q, cache, layer, tables, params)
        weighted, maximum, denominator = _merge_splits(*parts)
        return Partial(
            weighted=plan.unfold(weighted),
            maximum=plan.unfold(maximum),
            denominator=plan.unfold(denominator),
        )

    def _plan(self, q: Array, cache: PagedCache, tables: StepTables) -> "Plan":
        batch, tokens, num_heads, head_dim = q.shape
        num_layers, num_pages, num_kv_heads, page_size, _ = cache.k.shape
        # A cache that is not quantized is of the model's dtype, whatever that of q.
        stored = cache.k.dtype
        dtype = stored if cache.scales is None else q.dtype
        kind = AUTO if cache.scales is None else next(kind for kind, name in STORED.items() if name == stored.name)
        # Which device this is compiled for is not known here, and interpret mode runs on any.
        self.check(
            KernelTarget(platform="cuda", dtype=dtype.name, kv_cache_dtype=kind, head_dim=head_dim, page_size=page_size)
        )
        if num_layers * num_pages * num_kv_heads >= 2**31:
            raise ValueError(
                f"The attention kernel 'mosaic' counts pages in int32; {num_layers} layers x {num_pages} pages x "
                f"{num_kv_heads} heads are too many. Use a larger page_size."
            )
        rows = tokens * num_heads // num_kv_heads
        # The output of a tile is held in registers, twice while it is rescaled.
        most_rows = _MOST_ROWS if cache.scales is None else _MOST_QUANTIZED_ROWS
        tile = min(_round_up(rows, 8), most_rows, most_rows * 128 // head_dim // 8 * 8)
        tiles = _cdiv(rows, tile)
        context = _round_up(tables.block_tables.shape[1] * page_size, BLOCK)
        wanted = self.split_tokens or self._split(batch * num_kv_heads * tiles, context)
        return Plan(
            batch=batch,
            tokens=tokens,
            num_kv_heads=num_kv_heads,
            group=num_heads // num_kv_heads,
            head_dim=head_dim,
            tile=tile,
            tiles=tiles,
            page_size=page_size,
            num_pages=num_pages,
            split_tokens=min(wanted, context),
            splits=_cdiv(context, wanted),
            dtype=dtype,
            stored=stored,
        )

    def _split(self, num_items: int, context: int) -> int:
        """Tokens per split of `context`, such that the device is filled several times over where there is enough."""
        wanted = _cdiv(_WAVES * _BLOCKS_PER_SM * self.num_multiprocessors, num_items)
        return min(max(_round_up(_cdiv(context, wanted), BLOCK), _LEAST_SPLIT), _MOST_SPLIT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static shape of one call."""

    batch: int
    tokens: int
    num_kv_heads: int
    group: int
    head_dim: int
    tile: int
    """Rows (queries) of a thread block. Row r of a KV head is its query head r % group of new token r // group."""
    tiles: int
    """Tiles that the rows of a KV head come in."""
    page_size: int
    num_pages: int
    split_tokens: int
    splits: int
    dtype: Any
    """Of queries, and of what they are multiplied by."""
    stored: Any
    """Of keys and values in the cache."""

    @property
    def is_quantized(self) -> bool:
        """Whether keys and values have scales."""
        return is_quantized(self.stored)

    @property
    def weights_dtype(self) -> Any:
        """Of the softmax's weights, and of the values that they are multiplied by."""
        return weights_dtype(self.dtype) if self.is_quantized else self.dtype

    @property
    def stages(self) -> int:
        """Blocks of keys and values that are in shared memory or on their way to it."""
        vector = self.head_dim * jnp.dtype(self.stored).itemsize + scale_bytes(self.stored)
        widened = BLOCK * self.head_dim * 2 if self.is_quantized else 0
        stages = lambda shared: (shared - widened) // (2 * BLOCK * vector)  # noqa: E731
        return stages(_SHARED_BYTES) if stages(_SHARED_BYTES) >= _LEAST_STAGES else stages(_MOST_SHARED_BYTES)

    @property
    def copy_tokens(self) -> int:
        """Tokens of one copy: a page, or the part of it that is in a block."""
        return min(self.page_size, BLOCK)

    @property
    def copies(self) -> int:
        """Copies that fill a block."""
        return BLOCK // self.copy_tokens

    def fold(self, q: Array) -> Array:
        """[batch, tokens, num_heads, head_dim] as [batch, num_kv_heads * tiles, tile, head_dim], zeros below."""
        rows = self.tokens * self.group
        q = q.astype(self.dtype).reshape(self.batch, self.tokens, self.num_kv_heads, self.group, self.head_dim)
        q = jnp.moveaxis(q, 1, 2).reshape(self.batch, self.num_kv_heads, rows, self.head_dim)
        q = jnp.pad(q, ((0, 0), (0, 0), (0, self.tiles * self.tile - rows), (0, 0)))
        return q.reshape(self.batch, self.num_kv_heads * self.tiles, self.tile, self.head_dim)

    def unfold(self, x: Array) -> Array:
        """[batch, num_kv_heads * tiles, tile, ...] as [batch, tokens, num_heads, ...]: undoes `fold`."""
        inner = x.shape[3:]
        x = x.reshape(self.batch, self.num_kv_heads, self.tiles * self.tile, *inner)[:, :, : self.tokens * self.group]
        x = jnp.moveaxis(x.reshape(self.batch, self.num_kv_heads, self.tokens, self.group, *inner), 2, 1)
        return x.reshape(self.batch, self.tokens, self.num_kv_heads * self.group, *inner)


def _merge_splits(weighted: Array, maximum: Array, denominator: Array) -> tuple[Array, Array, Array]:
    """What `attend_splits` returns, head_dim last and without its axis of splits: `merge` over all of them.

    Two reductions, because XLA makes each one GPU kernel (and one of the swap of axes); written one array at a time it
    would make four."""

    def merge(a, b):
        maximum = jnp.maximum(a[0], b[0])
        pivot = jnp.where(maximum == -jnp.inf, 0.0, maximum)
        return maximum, a[1] * jnp.exp(a[0] - pivot) + b[1] * jnp.exp(b[0] - pivot)

    empty = np.float32(-np.inf), np.float32(0.0)
    merged, denominator = lax.reduce((maximum, denominator), empty, merge, (2,))
    scale = jnp.exp(maximum - jnp.where(merged == -jnp.inf, 0.0, merged)[:, :, None])
    return (jnp.swapaxes(weighted, -1, -2) * scale[..., None]).sum(axis=2), merged, denominator


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _cdiv(n: int, divisor: int) -> int:
    return -(-n // divisor)
