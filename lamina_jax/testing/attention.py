"""The conformance suite of attention kernels: cases, worlds to run them in, and a float64 oracle over plain arrays.

A test of a kernel calls `check_kernel` with what it is to compute.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from lamina_jax.attention.cache import PagedCache, StepTables, append
from lamina_jax.attention.kernels import AttentionKernel
from lamina_jax.attention.merge import merge
from lamina_jax.attention.params import AttendParams, LayerParams

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}
_LEAST_PAGE = {"auto": 8, "int8": 32, "fp8": 32}
"""Of the kernel "mosaic", by kv_cache_dtype."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Sequences with something cached and something new, and the shape of the attention."""

    context_lens: tuple[int, ...]
    num_new: tuple[int, ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    page_size: int = 4
    num_layers: int = 2
    layer: int = 1
    tokens: int | None = None
    """Columns of the step; more than max(num_new) is padding."""
    dtype: str = "float32"
    kv_cache_dtype: str = "auto"
    window: int | None = None
    soft_cap: float | None = None
    scale: float | None = None
    """None is what most models have."""
    value_size: float = 1.0
    """Standard deviation of the values."""

    @property
    def params(self) -> AttendParams:
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        return AttendParams(scale=scale, window=self.window, soft_cap=self.soft_cap)

    @property
    def is_quantized(self) -> bool:
        """Whether the cache is."""
        return self.kv_cache_dtype != "auto"

    @property
    def tolerance(self) -> float:
        """Largest error of a number of the output. What the cache rounded is not counted: the oracle sees it."""
        # The weights of a quantized cache are rounded to bfloat16 in place of float16.
        rounded = self.is_quantized and self.dtype == "float16"
        return TOLERANCE["bfloat16" if rounded else self.dtype]


def fitted_to_mosaic(case: Case) -> Case:
    """The case, or the nearest one of a shape that the kernel "mosaic" runs."""
    return dataclasses.replace(
        case,
        dtype="bfloat16" if case.dtype == "float32" else case.dtype,
        page_size=max(_LEAST_PAGE[case.kv_cache_dtype], 1 << (case.page_size - 1).bit_length()),
        head_dim=-(-case.head_dim // 64) * 64,
    )


CASES = {
    "decode": Case((1, 5, 17, 4), (1, 1, 1, 1)),
    "first token": Case((0,), (1,)),
    "prefill": Case((0, 0, 0), (7, 1, 4)),
    "prefill of a later piece": Case((3, 8), (5, 6)),
    "padded rows and columns": Case((2, 9, 0), (3, 1, 0), tokens=8),
    "mha": Case((6, 3), (1, 1), num_heads=3, num_kv_heads=3),
    "mqa": Case((6, 3), (2, 1), num_heads=5, num_kv_heads=1),
    "odd sizes": Case((10, 1), (1, 1), num_heads=9, num_kv_heads=3, head_dim=12, page_size=3),
    "page of one token": Case((5,), (2,), page_size=1),
    "bfloat16": Case((5, 30), (1, 1), dtype="bfloat16"),
    "float16": Case((5, 30), (3, 2), dtype="float16"),
    "window of the token itself": Case((0, 5, 9), (1, 3, 1), window=1),
    "window shorter than the context": Case((12, 30, 4), (1, 3, 6), window=5),
    "window as long as the context": Case((7, 8, 9), (1, 1, 1), window=8),
    "window longer than everything": Case((7, 0), (2, 3), window=100),
    "window shorter than the new tokens": Case((0, 6), (9, 7), window=4, tokens=10),
    "window of more than an int32": Case((7, 0), (2, 3), window=1 << 40),
    "soft cap": Case((5, 12), (1, 4), soft_cap=1.5, scale=2.0),
    "soft cap above all scores": Case((5, 12), (1, 4), soft_cap=1e6),
    "window and soft cap": Case((30, 2), (1, 4), window=6, soft_cap=1.5, scale=2.0),
    "several blocks of keys": Case((0, 200, 64), (1, 1, 1), num_kv_heads=1, scale=0.5),
    "window over several blocks": Case((400, 130, 70), (1, 1, 1), window=100),
    "many rows over several blocks": Case((150, 300), (9, 4), num_heads=8, num_kv_heads=1, window=200, scale=0.5),
    "page longer than a block": Case((70, 300), (1, 1), page_size=128, num_layers=1, layer=0),
    "wide heads": Case((5, 90), (1, 1), head_dim=128, num_kv_heads=1),
    "bfloat16, window and soft cap": Case((30, 2), (1, 4), window=6, soft_cap=1.5, scale=2.0, dtype="bfloat16"),
    "int8 cache": Case((1, 5, 17, 4), (1, 1, 1, 1), kv_cache_dtype="int8"),
    "fp8 cache": Case((1, 5, 17, 4), (1, 1, 1, 1), kv_cache_dtype="fp8"),
    "int8 cache of several blocks": Case((0, 200, 64), (1, 3, 1), scale=0.5, window=150, kv_cache_dtype="int8"),
    "fp8 cache of several blocks": Case((0, 200, 64), (1, 1, 1), scale=0.5, kv_cache_dtype="fp8", dtype="bfloat16"),
    "int8 cache, float16, small values": Case(
        (300, 9), (1, 2), kv_cache_dtype="int8", dtype="float16", value_size=1e-3, page_size=16
    ),
    "fp8 cache, page longer than a block": Case(
        (70, 300), (1, 1), page_size=128, num_layers=1, layer=0, kv_cache_dtype="fp8", dtype="float16"
    ),
    "int8 cache, wide heads": Case((5, 90), (3, 1), head_dim=256, num_kv_heads=1, kv_cache_dtype="int8", soft_cap=1.5),
}


@dataclasses.dataclass(frozen=True)
class World:
    """A case with numbers: what each sequence holds, and the paged cache that holds it."""

    case: Case
    past_k: list[np.ndarray]
    """Of a quantized cache in float64, times their scales."""
    past_v: list[np.ndarray]
    q: jax.Array
    k: jax.Array
    v: jax.Array
    cache: PagedCache
    tables: StepTables

    @classmethod
    def make(cls, case: Case, seed: int = 0) -> "World":
        rng = np.random.default_rng(seed)
        draw = lambda *shape: np.asarray(jnp.asarray(rng.standard_normal(shape), case.dtype))  # noqa: E731
        batch, tokens = len(case.context_lens), case.tokens or max(case.num_new)
        past_k, past_v = ([draw(n, case.num_kv_heads, case.head_dim) for n in case.context_lens] for _ in range(2))
        past_v = [case.value_size * x for x in past_v]
        widths = [-(-(c + n) // case.page_size) for c, n in zip(case.context_lens, case.num_new, strict=True)]
        num_pages = sum(widths) + 3
        free = iter(rng.permutation(num_pages))
        block_tables = rng.integers(0, num_pages, (batch, max(widths) + 2))
        for row, width in zip(block_tables, widths, strict=True):
            row[:width] = [next(free) for _ in range(width)]
        # Noise in every page: reading a token that the sequence does not have must show.
        shape = (case.num_layers, num_pages, case.num_kv_heads, case.page_size, case.head_dim)
        pages_k, pages_v = 100 * draw(*shape), 100 * draw(*shape)
        for b, row in enumerate(block_tables):
            for position in range(case.context_lens[b]):
                place = (case.layer, row[position // case.page_size], slice(None), position % case.page_size)
                pages_k[place], pages_v[place] = past_k[b][position], past_v[b][position]
        cache = PagedCache(k=jnp.asarray(pages_k), v=jnp.asarray(pages_v))
        if case.is_quantized:
            (pages_k, of_k), (pages_v, of_v) = (_quantize(x, case.kv_cache_dtype) for x in (pages_k, pages_v))
            cache = PagedCache(
                k=jnp.asarray(pages_k), v=jnp.asarray(pages_v), scales=jnp.asarray(np.stack([of_k, of_v], axis=-2))
            )
            past_k, past_v = ([_dequantize(*_quantize(x, case.kv_cache_dtype)) for x in p] for p in (past_k, past_v))
        return cls(
            case=case,
            past_k=past_k,
            past_v=past_v,
            q=jnp.asarray(draw(batch, tokens, case.num_heads, case.head_dim)),
            k=jnp.asarray(draw(batch, tokens, case.num_kv_heads, case.head_dim)),
            v=jnp.asarray(case.value_size * draw(batch, tokens, case.num_kv_heads, case.head_dim)),
            cache=cache,
            tables=StepTables(
                context_lens=jnp.asarray(case.context_lens, jnp.int32),
                num_new=jnp.asarray(case.num_new, jnp.int32),
                block_tables=jnp.asarray(block_tables, jnp.int32),
            ),
        )


def _quantize(x: np.ndarray, kv_cache_dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and float32 scales, made without the code that is tested."""
    stored, largest = {"int8": (np.int8, 127), "fp8": (ml_dtypes.float8_e4m3fn, 448)}[kv_cache_dtype]
    x = x.astype(np.float32)
    scales = np.abs(x).max(axis=-1) / np.float32(largest)
    numbers = np.clip(x / scales[..., None], -largest, largest)
    return (np.rint(numbers) if kv_cache_dtype == "int8" else numbers).astype(stored), scales


def _dequantize(numbers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return numbers.astype(np.float64) * scales.astype(np.float64)[..., None]


def attend_float64(world: World, b: int, t: int, params: AttendParams) -> np.ndarray:
    """Token t of sequence b over what the sequence holds, up to the token itself."""
    case = world.case
    k = np.concatenate([world.past_k[b], np.asarray(world.k[b, : t + 1])]).astype(np.float64)
    v = np.concatenate([world.past_v[b], np.asarray(world.v[b, : t + 1])]).astype(np.float64)
    if params.window is not None:
        k, v = k[-params.window :], v[-params.window :]
    group = case.num_heads // case.num_kv_heads
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = params.scale * np.einsum("hd,shd->hs", np.asarray(world.q[b, t]).astype(np.float64), k)
    if params.soft_cap is not None:
        scores = params.soft_cap * np.tanh(scores / params.soft_cap)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.einsum("hs,shd->hd", weights / weights.sum(axis=1, keepdims=True), v)


def run_step(kernel: AttentionKernel, world: World, params: LayerParams | None = None) -> tuple[jax.Array, PagedCache]:
    """What a worker does with a step of one layer: the attention output, and the cache with the new tokens in it."""
    layer = jnp.int32(world.case.layer)

    @jax.jit
    def step(cache, q, k, v, tables, params):
        both = merge(kernel.attend_cached(q, cache, layer, tables, params), kernel.attend_new(q, k, v, params))
        return both.output(q.dtype), append(cache, layer, k, v, tables)

    params = LayerParams.of(world.case.params) if params is None else params
    return step(world.cache, world.q, world.k, world.v, world.tables, params)


def check_kernel(kernel: AttentionKernel, world: World) -> None:
    """Raises AssertionError where the kernel's output is not that of float64 attention."""
    out, _ = run_step(kernel, world)
    assert out.dtype == world.q.dtype
    for b, count in enumerate(world.case.num_new):
        for t in range(count):
            expected = attend_float64(world, b, t, world.case.params)
            tolerance = world.case.tolerance * world.case.value_size
            np.testing.assert_allclose(
                np.asarray(out[b, t]).astype(np.float64),
                expected,
                atol=tolerance,
                rtol=0,
            )
