"""The quantized KV cache: what quantizing loses, and that nothing more is lost on the way to the output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_jax.attention.cache import PagedCache, StepTables, append
from lamina_jax.attention.kernels.xla import XlaKernel
from lamina_jax.attention.params import AttendParams, LayerParams
from lamina_jax.attention.quantization import is_quantized, quantize, scale_bytes, stored_dtype
from lamina_jax.engine.config import EngineConfig, size_cache
from lamina_jax.models.config import ModelConfig

QUANTIZED = ("int8", "fp8")
FLOAT32_ROUNDING = 1 + 2.0**-20


def largest_error(kv_cache_dtype, x, scale):
    """Of numbers `x`, float64, with their scale: half of the distance of int8's numbers, or of e4m3fn's (3 bits of
    mantissa, the smallest distance 2^-9)."""
    if kv_cache_dtype == "int8":
        return np.broadcast_to(scale / 2, x.shape)
    return np.maximum(np.abs(x) / 16, scale / 1024)


@given(
    exponents=st.lists(st.integers(-100, 100), min_size=1, max_size=6),
    head_dim=st.sampled_from([1, 3, 64]),
    kv_cache_dtype=st.sampled_from(QUANTIZED),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_quantizing_rounds_to_the_nearest_number_of_a_vectors_own_scale(
    exponents, head_dim, kv_cache_dtype, dtype, seed
):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((len(exponents), head_dim)) * np.exp2(np.array(exponents))[:, None]
    given_x = jnp.asarray(x, jnp.float32).astype(dtype)
    numbers, scale = quantize(given_x, stored_dtype(kv_cache_dtype, dtype))
    assert numbers.dtype == stored_dtype(kv_cache_dtype, dtype)
    assert scale.dtype == jnp.float32
    x, scale = np.asarray(given_x).astype(np.float64), np.asarray(scale).astype(np.float64)[:, None]
    stored = np.asarray(numbers).astype(np.float64)
    assert (np.abs(stored * scale - x) <= largest_error(kv_cache_dtype, x, scale) * FLOAT32_ROUNDING).all()
    # The whole range is used: the largest number is the largest that there is.
    np.testing.assert_array_equal(np.abs(stored).max(axis=1), {"int8": 127.0, "fp8": 448.0}[kv_cache_dtype])


@pytest.mark.parametrize("kv_cache_dtype", QUANTIZED)
def test_zeros_and_subnormal_numbers_are_stored_as_zeros(kv_cache_dtype):
    x = jnp.asarray([[0.0, 0.0], [1e-39, -1e-38]], jnp.float32)
    numbers, scale = quantize(x, stored_dtype(kv_cache_dtype, "float32"))
    assert np.isfinite(scale).all()
    assert not np.asarray(numbers).astype(np.float32).any()


@pytest.mark.parametrize("kv_cache_dtype", QUANTIZED)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows(kv_cache_dtype, bad):
    _, scale = quantize(jnp.asarray([[1.0, bad], [1.0, 2.0]], jnp.float32), stored_dtype(kv_cache_dtype, "float32"))
    assert np.isfinite(scale).tolist() == [False, True]


def test_conversion_of_stored_numbers_is_exact():
    for kv_cache_dtype in QUANTIZED:
        stored = np.arange(256, dtype=np.uint8).view(stored_dtype(kv_cache_dtype, "float32"))
        expected = stored.astype(np.float64)
        for dtype in ("float32", "bfloat16", "float16"):
            np.testing.assert_array_equal(np.asarray(jnp.asarray(stored).astype(dtype)).astype(np.float64), expected)


def test_names_of_dtypes():
    assert stored_dtype("auto", "bfloat16") == jnp.bfloat16
    assert stored_dtype("fp8", "bfloat16") == stored_dtype("fp8_e4m3", "float32") == jnp.float8_e4m3fn
    assert stored_dtype("int8", "float16") == jnp.int8
    assert [is_quantized(d) for d in ("int8", "float8_e4m3fn", "bfloat16", "float32")] == [True, True, False, False]
    with pytest.raises(ValueError, match="kv_cache_dtype must be one of auto, fp8, fp8_e4m3, int8, got 'fp4'"):
        stored_dtype("fp4", "bfloat16")


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    amplitude=st.sampled_from([0.1, 1.0, 10.0]),
    kv_cache_dtype=st.sampled_from(QUANTIZED),
    soft_cap=st.none() | st.just(5.0),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15)
def test_attention_is_as_near_to_the_unquantized_as_its_scores_and_values(
    lengths, amplitude, kv_cache_dtype, soft_cap, seed
):
    """Tokens through `append` and the kernel, against float64 attention over what was appended.

    Scores wrong by at most e make weights wrong by a factor of at most exp(2 e), so the output's error is at most
    expm1(2 e) max|v| + (largest error of a value). A soft cap's slope is at most 1."""
    rng = np.random.default_rng(seed)
    batch, tokens, heads, head_dim, page_size = len(lengths), max(lengths), 2, 16, 4
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    k = amplitude * draw(batch, tokens, 1, head_dim) * np.exp(draw(batch, tokens, 1, 1))
    v, q = draw(batch, tokens, 1, head_dim) * np.exp(draw(batch, tokens, 1, 1)), draw(batch, 1, heads, head_dim)
    width = -(-tokens // page_size)
    zeros, lens = jnp.zeros(batch, jnp.int32), jnp.asarray(lengths, jnp.int32)
    block_tables = jnp.asarray(rng.permutation(batch * width).reshape(batch, width), jnp.int32)
    sizes = {"num_pages": batch * width, "num_kv_heads": 1, "page_size": page_size, "head_dim": head_dim}
    cache = PagedCache.zeros(num_layers=1, **sizes, dtype="float32", kv_cache_dtype=kv_cache_dtype)
    before = StepTables(context_lens=zeros, num_new=lens, block_tables=block_tables)
    after = StepTables(context_lens=lens, num_new=jnp.ones_like(lens), block_tables=block_tables)
    params = AttendParams(scale=head_dim**-0.5, soft_cap=soft_cap)
    cache = jax.jit(append)(cache, jnp.int32(0), k, v, before)
    out = jax.jit(XlaKernel().attend_cached)(jnp.asarray(q), cache, jnp.int32(0), after, LayerParams.of(params))
    out = np.asarray(out.output(jnp.float32)).astype(np.float64)
    largest = {"int8": 127, "fp8": 448}[kv_cache_dtype]
    for b, length in enumerate(lengths):
        keys, values, queries = (x.astype(np.float64) for x in (k[b, :length, 0], v[b, :length, 0], q[b, 0]))
        of_each = [np.abs(x).max(axis=1, keepdims=True) / largest for x in (keys, values)]
        errors = [largest_error(kv_cache_dtype, x, s) for x, s in zip((keys, values), of_each, strict=True)]
        scores = params.scale * queries @ keys.T
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        expected = (weights / weights.sum(axis=1, keepdims=True)) @ values
        wrong = (params.scale * np.abs(queries) @ errors[0].T).max(axis=1, keepdims=True)
        bound = np.expm1(2 * wrong) * np.abs(values).max() + errors[1].max()
        assert (np.abs(out[b, 0] - expected) <= bound * FLOAT32_ROUNDING + 1e-4).all()


def test_the_cache_counts_bytes_really_used():
    sizes = {"num_layers": 2, "num_pages": 3, "num_kv_heads": 4, "page_size": 16, "head_dim": 128, "dtype": "bfloat16"}
    auto, fp8 = (PagedCache.zeros(**sizes, kv_cache_dtype=name) for name in ("auto", "fp8"))
    vectors = 2 * 2 * 3 * 4 * 16
    assert auto.nbytes == vectors * 256
    assert fp8.nbytes == vectors * 132
    assert (scale_bytes("bfloat16"), scale_bytes("int8")) == (0, 4)


@pytest.mark.parametrize(("kv_cache_dtype", "times"), [("auto", 1.0), ("fp8", 256 / 132), ("int8", 256 / 132)])
def test_nearly_twice_the_tokens_fit(kv_cache_dtype, times):
    model = ModelConfig.from_file("configs/models/llama3_70b.json")
    config = EngineConfig(kv_cache_dtype=kv_cache_dtype, kv_cache_bytes=10 << 30, max_num_seqs=1000)
    num_pages = size_cache(config, model, "bfloat16").num_pages
    assert num_pages == int(times * (10 << 30) / (2 * 80 * 8 * 256 * 16))
