"""Paged attention on Hopper GPUs, in Pallas Mosaic GPU.

Decoding reads every cached key and value once and does little with each, so the kernel is built to keep memory busy.
A thread block serves one KV head of one sequence over one piece of its context (split-K, as in flash decoding; Dao et
al., 2023): one warpgroup asks the copy engine (TMA) for pages, several blocks of keys ahead, and another consumes them.

The products are computed transposed. A tensor core multiplies 64 rows at a time, and in decoding a KV head has
as many queries as its group is large, often 8 or fewer. So keys, of which there are plenty, are made the rows:

    scores^T [keys, queries]  = K [keys, head_dim] @ Q^T
    output^T [head_dim, queries] += V^T [head_dim, keys] @ P [keys, queries]

and queries are padded to 8 instead of 64. The softmax then costs a few numbers per thread and step.
"""

import dataclasses
import functools
import math
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

_LOG2E = math.log2(math.e)
_SWIZZLE = 128
"""Bytes of a row of a shared memory tile, permuted so that the tensor core reads it without bank conflicts."""


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

    def paged_attention(*refs) -> None:  # the name that profilers show
        _body(plan, *refs)

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


def _scratch(plan: Plan) -> list[Any]:
    tiling = plgpu.TilingTransform((8, _SWIZZLE // 2))  # pyright: ignore[reportAbstractUsage]
    transforms = (tiling, plgpu.SwizzleTransform(_SWIZZLE))  # pyright: ignore[reportAbstractUsage]
    shared = lambda *shape: plgpu.SMEM(shape, plan.dtype, transforms=transforms)  # noqa: E731
    ring = [
        shared(plan.stages, BLOCK, plan.head_dim),
        plgpu.Barrier(num_arrivals=plan.copies, num_barriers=plan.stages),
        plgpu.Barrier(num_barriers=plan.stages),
    ]
    return [*ring, *ring, shared(plan.tile, plan.head_dim), plgpu.Barrier(), shared(plan.tile, BLOCK)]


def _body(plan: Plan, q, k, v, block_tables, context_lens, scalars, o, m, l, *scratch) -> None:  # noqa: E741
    """What each of the two warpgroups of a thread block does."""
    ring_k, ring_v = _Ring(*scratch[:3]), _Ring(*scratch[3:6])
    q_shared, q_ready, p_shared = scratch[6:]
    split, head, sequence = (lax.axis_index(name) for name in ("split", "head", "sequence"))
    layer, scale, window = (ref[0] for ref in scalars[:3])
    soft_cap = scalars[3][0] if len(scalars) > 3 else None
    work = _Work.of(plan, context_lens[sequence], window, split, lax.rem(head, jnp.int32(plan.tiles)))

    @pl.when(lax.axis_index("warpgroup") == 0)
    def _load() -> None:
        kv_head = lax.div(head, jnp.int32(plan.tiles))
        index = lambda page: (layer * plan.num_pages + page) * plan.num_kv_heads + kv_head  # noqa: E731
        _load_pages(plan, work, lambda page: index(block_tables[sequence, page]), (k, ring_k), (v, ring_v))

    @pl.when(lax.axis_index("warpgroup") == 1)
    def _consume() -> None:
        plgpu.copy_gmem_to_smem(q.at[sequence, head], q_shared, q_ready)
        plgpu.barrier_wait(q_ready)
        step = functools.partial(
            _attend_block, plan, work, scale * _LOG2E, soft_cap, q_shared, p_shared, ring_k, ring_v
        )
        layout = plgpu.Layout.WGMMA
        state = (
            plgpu.layout_cast(jnp.full((plan.tile,), -jnp.inf, jnp.float32), layout.reduce(0)),
            plgpu.layout_cast(jnp.zeros((BLOCK, plan.tile), jnp.float32), layout),
            plgpu.layout_cast(jnp.zeros((plan.head_dim, plan.tile), jnp.float32), layout),
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


def _load_pages(plan: Plan, work: _Work, find, *sources) -> None:
    """Streams the blocks of every (pages, ring). `find` makes a page's place in the sequence its row in `pages`."""
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
        for pages, ring in sources:

            @pl.when(block >= plan.stages)
            def _(ring=ring, slot=slot) -> None:
                plgpu.barrier_wait(ring.free.at[slot])

            for i, row in enumerate(rows):
                part = pl.ds(i * plan.copy_tokens, plan.copy_tokens)
                source = pages.at[row, pl.ds(offset, plan.copy_tokens)]
                plgpu.copy_gmem_to_smem(source, ring.slots.at[slot, part], ring.full.at[slot])
        return following

    lax.fori_loop(0, work.num_blocks, load, rows_of(jnp.int32(0)))

    # Every arrival at a barrier is awaited, also of the blocks that no other takes the place of.
    @pl.loop(jnp.maximum(work.num_blocks - plan.stages, 0), work.num_blocks)
    def _drain(block) -> None:
        for _, ring in sources:
            plgpu.barrier_wait(ring.free.at[lax.rem(block, jnp.int32(plan.stages))])


def _attend_block(plan: Plan, work: _Work, scale, soft_cap, q, p_shared, ring_k: _Ring, ring_v: _Ring, block, state):
    """One step of the online softmax (Milakov and Gimelshein, arXiv 1805.02867), in powers of two."""
    maximum, denominators, weighted = state
    slot = lax.rem(block, jnp.int32(plan.stages))
    along_rows = lambda x, like: lax.broadcast_in_dim(x, like.shape, [1])  # noqa: E731

    plgpu.barrier_wait(ring_k.full.at[slot])
    scores = _product(ring_k.slots.at[slot], q.T)
    plgpu.barrier_arrive(ring_k.free.at[slot])
    scores = _masked(plan, work, block, _capped(scores * scale, soft_cap))

    new_maximum = jnp.maximum(maximum, scores.max(axis=0))
    # A row may have seen nothing yet: exp2(-inf - -inf) would be nan.
    pivot = jnp.where(new_maximum == -jnp.inf, 0.0, new_maximum)
    p = jnp.exp2(scores - along_rows(pivot, scores))
    rescale = jnp.exp2(maximum - pivot)
    denominators = denominators * along_rows(rescale, denominators) + p
    p_shared.T[...] = p.astype(plan.dtype)
    plgpu.commit_smem()

    plgpu.barrier_wait(ring_v.full.at[slot])
    part = _product(ring_v.slots.at[slot].T, p_shared.T)
    plgpu.barrier_arrive(ring_v.free.at[slot])
    return new_maximum, denominators, weighted * along_rows(rescale, weighted) + part


def _product(a, b) -> Array:
    """``a @ b`` of two arrays in shared memory, in float32."""

    def multiply(accumulator):
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32))


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
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, scores.shape, layout=plgpu.Layout.WGMMA)
    key = iota(0) + (work.first_block + block) * BLOCK
    query = work.context
    if plan.tokens > 1:
        query = work.context + lax.div(iota(1) + work.first_row, jnp.int32(plan.group))
    return jnp.where((key < work.context) & (key > query - work.window), scores, -jnp.inf)
