"""Paged attention on Hopper GPUs, in Pallas Mosaic GPU.

Decoding reads every cached key and value once and does little with each, so the kernel is built to keep memory busy.
A thread block serves one KV head of one sequence over one piece of its context (split-K, as in flash decoding; Dao et
al., 2023): one warpgroup asks the copy engine (TMA) for pages, several blocks of keys ahead, and another consumes them.

The products are computed transposed. A tensor core multiplies 64 rows at a time, and in decoding a KV head has
as many queries as its group is large, often 8 or fewer. So keys, of which there are plenty, are made the rows:

    scores^T [keys, queries]  = K [keys, head_dim] @ Q^T
    output^T [head_dim, queries] += V^T [head_dim, keys] @ P [keys, queries]

and queries are padded to 8 instead of 64. The softmax then costs a few numbers per thread and step.

Tensor cores multiply no 1-byte numbers by 16-bit ones, so the consumer widens those of a quantized cache: keys in
registers, which the tensor core reads as well as shared memory, and values by way of shared memory, because it reads
registers row by row only. Scales come with their pages: those of keys multiply rows of scores^T, those of values rows
of P.
"""

import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from lamina_jax.attention.cache import PagedCache, StepTables
from lamina_jax.attention.kernels.mosaic import BLOCK, Plan
from lamina_jax.attention.params import LayerParams
from lamina_jax.attention.quantization import SCALE_DTYPE

_LOG2E = math.log2(math.e)
_SWIZZLE = 128
"""Bytes of a row of a shared memory tile at most, permuted so that nobody who reads it has bank conflicts."""
_LAYOUT = plgpu.Layout.WGMMA
"""How threads hold a matrix that a tensor core has computed or, if it is the first factor, is to multiply."""


def attend_splits(
    plan: Plan,
    interpret: plgpu.InterpretGPUParams | None,
    q: Array,
    cache: PagedCache,
    layer: Array,
    tables: StepTables,
    params: LayerParams,
) -> tuple[Array, Array, Array]:
    """``weighted [batch, heads, splits, head_dim, tile]``, and ``maximum`` and ``denominator`` without head_dim.

    Heads are here the tiles of all KV heads."""
    heads = plan.num_kv_heads * plan.tiles
    stat = jax.ShapeDtypeStruct((plan.batch, heads, plan.splits, plan.tile), jnp.float32)
    out = jax.ShapeDtypeStruct((plan.batch, heads, plan.splits, plan.head_dim, plan.tile), jnp.float32)
    pages = (-1, plan.page_size, plan.head_dim)
    as_ref = lambda x, dtype: jnp.asarray(x, dtype).reshape(-1)  # noqa: E731
    # Scalars of the layer, as arrays of one: the kernel reads them, so that one program serves every layer.
    scalars = [as_ref(layer, jnp.int32), as_ref(params.scale, jnp.float32), as_ref(params.window, jnp.int32)]
    if params.soft_cap is not None:
        scalars.append(as_ref(params.soft_cap, jnp.float32))

    # Interpret mode multiplies what is in shared memory only.
    from_registers = _product if interpret is None else _product_in_interpret_mode

    def paged_attention(*refs, **scratch) -> None:  # the name that profilers show
        _body(plan, from_registers, *refs, **scratch)

    kernel = plgpu.kernel(
        paged_attention,
        out_type=(out, stat, stat),
        # Sequences vary fastest and splits slowest: long contexts start first, and what is beyond the end of short
        # ones, which is no work, comes last.
        grid=(plan.splits, heads, plan.batch),
        grid_names=("split", "head", "sequence"),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=_scratch(plan),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return kernel(
        plan.fold(q),
        cache.k.reshape(pages),
        cache.v.reshape(pages),
        None if cache.scales is None else cache.scales.reshape(-1, 2, plan.page_size),
        jnp.asarray(tables.block_tables, jnp.int32),
        jnp.asarray(tables.context_lens, jnp.int32),
        tuple(scalars),
    )


@dataclasses.dataclass(frozen=True)
class _Ring:
    """Blocks of pages in shared memory: filled by the loader, freed by the consumer."""

    slots: Any
    full: Any
    free: Any
    scales: Any
    """None if the cache is not quantized."""


def _scratch(plan: Plan) -> dict[str, Any]:
    ring = (
        _tiled(plan.stored, plan.stages, BLOCK, plan.head_dim),
        plgpu.Barrier(num_arrivals=plan.copies * (2 if plan.is_quantized else 1), num_barriers=plan.stages),
        plgpu.Barrier(num_barriers=plan.stages),
        plgpu.SMEM((plan.stages, BLOCK), SCALE_DTYPE) if plan.is_quantized else None,
    )
    return {
        "ring_k": ring,
        "ring_v": ring,
        "q_shared": _tiled(plan.dtype, plan.tile, plan.head_dim),
        "q_ready": plgpu.Barrier(),
        "p_shared": _tiled(plan.weights_dtype, plan.tile, BLOCK),
        "wide": _tiled(plan.weights_dtype, BLOCK, plan.head_dim) if plan.is_quantized else None,
    }


def _tiled(dtype: Any, *shape: int) -> Any:
    """Shared memory as tensor cores and the copy engine take it."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = math.gcd(_SWIZZLE, shape[-1] * itemsize)
    tiling = plgpu.TilingTransform((8, swizzle // itemsize))  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))  # pyright: ignore[reportAbstractUsage]


def _body(
    plan: Plan,
    from_registers,
    q,
    k,
    v,
    scales,
    block_tables,
    context_lens,
    scalars,
    o,
    m,
    l,  # noqa: E741
    *,
    ring_k,
    ring_v,
    q_shared,
    q_ready,
    p_shared,
    wide,
) -> None:
    """What each of the two warpgroups of a thread block does."""
    ring_k, ring_v = _Ring(*ring_k), _Ring(*ring_v)
    split, head, sequence = (lax.axis_index(name) for name in ("split", "head", "sequence"))
    layer, scale, window = (ref[0] for ref in scalars[:3])
    soft_cap = scalars[3][0] if len(scalars) > 3 else None
    work = _Work.of(plan, context_lens[sequence], window, split, lax.rem(head, jnp.int32(plan.tiles)))

    @pl.when(lax.axis_index("warpgroup") == 0)
    def _load() -> None:
        kv_head = lax.div(head, jnp.int32(plan.tiles))
        index = lambda page: (layer * plan.num_pages + page) * plan.num_kv_heads + kv_head  # noqa: E731
        of_k, of_v = (None, None) if scales is None else (scales.at[:, 0], scales.at[:, 1])
        sources = [_Source(k, of_k, ring_k), _Source(v, of_v, ring_v)]
        _load_pages(plan, work, lambda page: index(block_tables[sequence, page]), sources)

    @pl.when(lax.axis_index("warpgroup") == 1)
    def _consume() -> None:
        plgpu.copy_gmem_to_smem(q.at[sequence, head], q_shared, q_ready)
        plgpu.barrier_wait(q_ready)
        scores = functools.partial(_scores, plan, from_registers, q_shared, ring_k)
        values = functools.partial(_weighted_values, plan, p_shared, wide, ring_v)
        step = functools.partial(_attend_block, plan, work, scale * _LOG2E, soft_cap, scores, values)
        state = (
            plgpu.layout_cast(jnp.full((plan.tile,), -jnp.inf, jnp.float32), _LAYOUT.reduce(0)),
            plgpu.layout_cast(jnp.zeros((BLOCK, plan.tile), jnp.float32), _LAYOUT),
            plgpu.layout_cast(jnp.zeros((plan.head_dim, plan.tile), jnp.float32), _LAYOUT),
        )
        maximum, denominators, weighted = lax.fori_loop(0, work.num_blocks, step, state)
        place = (sequence, head, split)
        o[place] = weighted
        m[place] = maximum / _LOG2E
        l[place] = denominators.sum(axis=0)


@dataclasses.dataclass(frozen=True)
class _Work:
    """Which keys a thread block attends over. Traced int32 numbers."""

    context: Any
    """Tokens of the sequence in the cache."""
    window: Any
    first_row: Any
    """Row of the KV head that is the first of this tile."""
    first_block: Any
    num_blocks: Any

    @classmethod
    def of(cls, plan: Plan, context, window, split, tile) -> "_Work":
        first_row = tile * plan.tile
        first_token = lax.div(first_row, jnp.int32(plan.group))
        # No row sees a key before this one; what is before it is not read. (context + token - window cannot
        # overflow: the window is positive.)
        first_key = jnp.maximum(context + first_token - window + 1, 0)
        blocks = plan.split_tokens // BLOCK
        first_block = lax.div(first_key, jnp.int32(BLOCK)) + split * blocks
        end = jnp.minimum(first_block + blocks, lax.div(context + BLOCK - 1, jnp.int32(BLOCK)))
        return cls(context, window, first_row, first_block, jnp.maximum(end - first_block, 0))


@dataclasses.dataclass(frozen=True)
class _Source:
    """Pages in the cache, by row, with their scales, if they have some, and where they go."""

    pages: Any
    scales: Any
    ring: _Ring


def _load_pages(plan: Plan, work: _Work, find, sources: list[_Source]) -> None:
    """Streams the blocks of every source. `find` makes a page's place in the sequence its row in `pages`."""
    last_page = lax.div(jnp.maximum(work.context - 1, 0), jnp.int32(plan.page_size))

    def rows_of(block) -> list[Any]:
        start = lax.div((work.first_block + block) * BLOCK, jnp.int32(plan.page_size))
        # A block is filled to its end, with its last page again, so that no uninitialized number is multiplied by 0.
        return [find(jnp.minimum(start + i, last_page)) for i in range(plan.copies)]

    def load(block, rows):
        slot, offset = lax.rem(block, jnp.int32(plan.stages)), 0
        if plan.page_size > BLOCK:
            offset = lax.rem((work.first_block + block) * BLOCK, jnp.int32(plan.page_size))
        # Looked up a block ahead, so that nobody waits for the block table.
        following = rows_of(block + 1)
        for source in sources:
            ring = source.ring

            @pl.when(block >= plan.stages)
            def _(ring=ring, slot=slot) -> None:
                plgpu.barrier_wait(ring.free.at[slot])

            for i, row in enumerate(rows):
                tokens, part = pl.ds(offset, plan.copy_tokens), pl.ds(i * plan.copy_tokens, plan.copy_tokens)
                plgpu.copy_gmem_to_smem(source.pages.at[row, tokens], ring.slots.at[slot, part], ring.full.at[slot])
                if plan.is_quantized:
                    scales = source.scales.at[row, tokens]
                    plgpu.copy_gmem_to_smem(scales, ring.scales.at[slot, part], ring.full.at[slot])
        return following

    lax.fori_loop(0, work.num_blocks, load, rows_of(jnp.int32(0)))

    # Every arrival at a barrier is awaited, also of the blocks that no other takes the place of.
    @pl.loop(jnp.maximum(work.num_blocks - plan.stages, 0), work.num_blocks)
    def _drain(block) -> None:
        for source in sources:
            plgpu.barrier_wait(source.ring.free.at[lax.rem(block, jnp.int32(plan.stages))])


def _attend_block(plan: Plan, work: _Work, scale, soft_cap, scores_in, weighted_values_in, block, state):
    """One step of the online softmax (Milakov and Gimelshein, arXiv 1805.02867), in powers of two."""
    maximum, denominators, weighted = state
    slot = lax.rem(block, jnp.int32(plan.stages))
    along_rows = lambda x, like: lax.broadcast_in_dim(x, like.shape, [1])  # noqa: E731

    scores = _masked(plan, work, block, _capped(scores_in(slot) * scale, soft_cap))
    new_maximum = jnp.maximum(maximum, scores.max(axis=0))
    # A row may have seen nothing yet: exp2(-inf - -inf) would be nan.
    pivot = jnp.where(new_maximum == -jnp.inf, 0.0, new_maximum)
    p = jnp.exp2(scores - along_rows(pivot, scores))
    rescale = jnp.exp2(maximum - pivot)
    denominators = denominators * along_rows(rescale, denominators) + p
    return new_maximum, denominators, weighted * along_rows(rescale, weighted) + weighted_values_in(slot, p)


def _scores(plan: Plan, from_registers, q, ring: _Ring, slot) -> Array:
    """The products of the keys of a slot and the queries, [keys, queries]; frees the slot."""
    plgpu.barrier_wait(ring.full.at[slot])
    if plan.is_quantized:

        def part(columns) -> Array:
            keys = plgpu.layout_cast(_widened(ring.slots.at[slot, :, columns], plan.dtype), _LAYOUT)
            return from_registers(keys, q.at[:, columns].T)

        scores = functools.reduce(operator.add, map(part, _columns(plan)))
        scores = scores * _along_columns(ring.scales.at[slot], scores)
        # The copy engine may write over only what it can see has been read; what the tensor core reads, it sees.
        plgpu.commit_smem()
    else:
        scores = _product(ring.slots.at[slot], q.T)
    plgpu.barrier_arrive(ring.free.at[slot])
    return scores


def _weighted_values(plan: Plan, p_shared, wide, ring: _Ring, slot, p) -> Array:
    """The sums of the values of a slot, weighted by ``p [keys, queries]``, [head_dim, queries]; frees the slot."""
    plgpu.barrier_wait(ring.full.at[slot])
    values = ring.slots.at[slot]
    if plan.is_quantized:
        p = p * _along_columns(ring.scales.at[slot], p)
        for columns in _columns(plan):
            wide[:, columns] = _widened(values.at[:, columns], plan.weights_dtype)
        values = wide
    p_shared.T[...] = p.astype(plan.weights_dtype)
    plgpu.commit_smem()
    part = _product(values.T, p_shared.T)
    plgpu.barrier_arrive(ring.free.at[slot])
    return part


def _columns(plan: Plan) -> list[Any]:
    """Parts of a head, such that two widened blocks of a part fit in registers."""
    width = 128 if plan.head_dim % 128 == 0 else 64
    return [pl.ds(start, width) for start in range(0, plan.head_dim, width)]


def _widened(numbers, dtype) -> Array:
    """1-byte numbers in shared memory as those of a 16-bit dtype in registers."""
    wide = plgpu.load(numbers, layout=plgpu.Layout.WGMMA_UPCAST_2X)
    if wide.dtype != jnp.int8:
        # Hopper converts fp8 to float16 only.
        wide = wide.astype(jnp.float16)
    if wide.dtype == jnp.float16 and dtype == jnp.bfloat16:
        wide = wide.astype(jnp.float32)
    return wide.astype(dtype)


def _along_columns(scales, like) -> Array:
    """Scales in shared memory, one for each row of `like`, in its shape."""
    return lax.broadcast_in_dim(plgpu.load(scales, layout=_LAYOUT.reduce(1), optimized=False), like.shape, [0])


def _product(a, b) -> Array:
    """``a @ b`` in float32, of `b` in shared memory and `a` there or in registers."""

    def multiply(accumulator):
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32))


def _product_in_interpret_mode(a, b) -> Array:
    """The same of `a` in registers, without a tensor core."""
    return jnp.dot(a, b[...], preferred_element_type=jnp.float32)


def _capped(scores, soft_cap):
    """Soft-capped scores, all in units of log2(e). An infinite cap leaves them as they are."""
    if soft_cap is None:
        return scores
    cap = soft_cap * _LOG2E
    # Compared as an array: a selection by one flag for all would not compile.
    uncapped = jnp.full(scores.shape, soft_cap) == jnp.inf
    return jnp.where(uncapped, scores, cap * _tanh(scores / cap))


def _tanh(x):
    """To about 1e-6 of the result; the hardware's own tanh is only good to 2^-11."""
    far = 1.0 - 2.0 / (jnp.exp2(x * (2.0 * _LOG2E)) + 1.0)
    # Near 0 that would cancel; there, the Taylor series up to x^7.
    square = x * x
    near = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315))))
    return jnp.where(jnp.abs(x) < 0.1, near, far)


def _masked(plan: Plan, work: _Work, block, scores):
    """-inf where a row does not see a key: past the end of the context, or out of its window."""
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, scores.shape, layout=_LAYOUT)
    key = iota(0) + (work.first_block + block) * BLOCK
    query = work.context
    if plan.tokens > 1:
        query = work.context + lax.div(iota(1) + work.first_row, jnp.int32(plan.group))
    return jnp.where((key < work.context) & (key > query - work.window), scores, -jnp.inf)
