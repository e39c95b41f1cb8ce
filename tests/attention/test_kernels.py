"""Every attention kernel against float64 attention; GPU kernels in interpret mode, with race detection."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # there is no public way to ask for races
from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams

from lamina_jax.attention.cache import PagedCache
from lamina_jax.attention.kernels import KERNELS, AttentionKernel, KernelTarget, choose_kernel, get_kernel
from lamina_jax.attention.kernels.mosaic import MosaicKernel
from lamina_jax.attention.kernels.xla import XlaKernel
from lamina_jax.attention.merge import merge
from lamina_jax.attention.params import AttendParams, LayerParams
from lamina_jax.attention.quantization import quantize
from lamina_jax.testing.attention import CASES, Case, World, check_kernel, fitted_to_mosaic, run_step

SUBJECTS: dict[str, AttentionKernel] = {
    "xla": XlaKernel(),
    # Splits of two blocks, so that small cases have several splits and several blocks.
    "mosaic": MosaicKernel(interpret=InterpretGPUParams(detect_races=True), split_tokens=128),
}


def fitted(kernel_name: str, case: Case) -> Case:
    """The case, or the nearest one of a shape that the kernel runs."""
    return case if kernel_name == "xla" else fitted_to_mosaic(case)


@pytest.fixture(autouse=True)
def no_races():
    """What one thread of a GPU kernel writes and another reads has a barrier in between."""
    yield
    if gpu_callbacks._races is not None:
        assert not gpu_callbacks.get_races().races_found


def test_every_kernel_is_tested():
    assert SUBJECTS.keys() == KERNELS.keys()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernel_name", SUBJECTS)
def test_kernel_equals_float64(kernel_name, name):
    check_kernel(SUBJECTS[kernel_name], World.make(fitted(kernel_name, CASES[name])))


RANDOM_SHAPES = {
    "rows": st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5)), min_size=1, max_size=4),
    "heads": st.sampled_from([(1, 1), (4, 2), (6, 3), (4, 4), (8, 1)]),
    "page_size": st.integers(1, 16),
    "window": st.none() | st.integers(1, 50),
    "soft_cap": st.none() | st.floats(0.5, 50.0),
    "seed": st.integers(0, 1000),
}


def check_random_shape(kernel_name, rows, heads, page_size, window, soft_cap, seed, kv_cache_dtype="auto"):
    context_lens, num_new = zip(*rows, strict=True)
    params = {"window": window, "soft_cap": soft_cap, "kv_cache_dtype": kv_cache_dtype}
    case = Case(context_lens, num_new, num_heads=heads[0], num_kv_heads=heads[1], page_size=page_size, **params)
    check_kernel(SUBJECTS[kernel_name], World.make(fitted(kernel_name, case), seed))


@given(**RANDOM_SHAPES)
@settings(max_examples=15, deadline=None)
def test_xla_kernel_equals_float64_on_random_shapes(**shape):
    check_random_shape("xla", **shape)


# Interpret mode takes seconds for an example.
@given(**RANDOM_SHAPES)
@settings(max_examples=4, deadline=None)
def test_mosaic_kernel_equals_float64_on_random_shapes(**shape):
    check_random_shape("mosaic", **shape)


@given(kv_cache_dtype=st.sampled_from(["int8", "fp8"]), **RANDOM_SHAPES)
@settings(max_examples=4, deadline=None)
def test_mosaic_kernel_over_quantized_caches_equals_float64_on_random_shapes(**shape):
    check_random_shape("mosaic", **shape)


@pytest.mark.parametrize("kernel_name", SUBJECTS)
def test_a_layer_without_window_or_cap_is_the_same_beside_layers_with_them(kernel_name):
    world = World.make(fitted(kernel_name, CASES["prefill of a later piece"]))
    plain = world.case.params
    stacked = LayerParams.stack([plain, AttendParams(scale=1.0, window=3, soft_cap=2.0)])
    assert stacked.soft_cap is not None
    assert LayerParams.of(plain).soft_cap is None
    out, _ = run_step(SUBJECTS[kernel_name], world, jax.tree.map(lambda x: x[0], stacked))
    np.testing.assert_array_equal(out, run_step(SUBJECTS[kernel_name], world)[0])


@pytest.mark.parametrize("kernel_name", SUBJECTS)
@pytest.mark.parametrize("name", ["decode", "soft cap", "window and soft cap"])
def test_parameters_that_xla_knows_round_as_those_it_does_not(kernel_name, name):
    """Constants of the unsplit run are arguments in a worker, and a constant divisor may become a factor."""
    world, layer = World.make(fitted(kernel_name, CASES[name])), jnp.int32(1)
    # A cap whose reciprocal is not exact.
    params = LayerParams.of(dataclasses.replace(world.case.params, scale=0.3, soft_cap=world.case.soft_cap and 1.7))
    kernel = SUBJECTS[kernel_name]

    @jax.jit
    def known(q, k, v):
        cached = kernel.attend_cached(q, world.cache, layer, world.tables, params)
        return merge(cached, kernel.attend_new(q, k, v, params)).output(q.dtype)

    expected, _ = run_step(SUBJECTS[kernel_name], world, params)
    np.testing.assert_array_equal(known(world.q, world.k, world.v), expected)


@pytest.mark.parametrize("name", CASES)
def test_append_writes_the_new_tokens_and_nothing_else(name):
    world = World.make(CASES[name])
    case = world.case
    _, cache = run_step(SUBJECTS["xla"], world)
    if case.is_quantized:
        check_quantized_append(world, cache)
        return
    expected_k, expected_v = np.array(world.cache.k), np.array(world.cache.v)
    for b, count in enumerate(case.num_new):
        for t in range(count):
            page, offset = divmod(case.context_lens[b] + t, case.page_size)
            place = (case.layer, int(world.tables.block_tables[b, page]), slice(None), offset)
            expected_k[place], expected_v[place] = world.k[b, t], world.v[b, t]
    np.testing.assert_array_equal(cache.k, expected_k)
    np.testing.assert_array_equal(cache.v, expected_v)


def check_quantized_append(world: World, cache: PagedCache) -> None:
    """What `quantize` makes of the new tokens is where they belong, and nothing else has changed."""
    case = world.case
    assert world.cache.scales is not None
    assert cache.scales is not None
    expected = [np.array(x) for x in (world.cache.k, world.cache.v, world.cache.scales)]
    (new_k, of_k), (new_v, of_v) = (quantize(x, cache.k.dtype) for x in (world.k, world.v))
    for b, count in enumerate(case.num_new):
        for t in range(count):
            page, offset = divmod(case.context_lens[b] + t, case.page_size)
            place = (case.layer, int(world.tables.block_tables[b, page]), slice(None), offset)
            expected[0][place], expected[1][place] = new_k[b, t], new_v[b, t]
            expected[2][(*place[:3], slice(None), offset)] = np.stack([of_k[b, t], of_v[b, t]], axis=-1)
    for array, actual in zip(expected, (cache.k, cache.v, cache.scales), strict=True):
        np.testing.assert_array_equal(actual, array)


def test_unknown_kernel_names_the_known_ones():
    with pytest.raises(ValueError, match=r"Unknown attention kernel 'nope'.*'mosaic', 'xla'"):
        get_kernel("nope", jax.devices()[0])


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "fp8"])
def test_blocks_take_the_place_of_those_before_them_only_when_these_are_used_up(kv_cache_dtype):
    """Nine blocks of keys through three stages, or four if the cache is quantized."""
    kernel = MosaicKernel(interpret=InterpretGPUParams(detect_races=True), split_tokens=576)
    shape = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 128, "page_size": 64}
    case = Case((570,), (1,), **shape, dtype="bfloat16", kv_cache_dtype=kv_cache_dtype)
    check_kernel(kernel, World.make(case))


HOPPER = KernelTarget(platform="cuda", compute_capability="9.0", dtype="bfloat16", head_dim=128, page_size=16)
CPU = dataclasses.replace(HOPPER, platform="cpu", compute_capability=None)


def test_auto_is_the_fastest_kernel_that_runs():
    large_pages = dataclasses.replace(HOPPER, page_size=32)
    for target in (
        HOPPER,
        dataclasses.replace(large_pages, kv_cache_dtype="int8"),
        dataclasses.replace(large_pages, kv_cache_dtype="fp8"),
        dataclasses.replace(large_pages, kv_cache_dtype="fp8_e4m3", dtype="float16"),
    ):
        assert choose_kernel("auto", target) == "mosaic"
    for other in (
        CPU,
        dataclasses.replace(HOPPER, compute_capability="8.0"),
        dataclasses.replace(HOPPER, compute_capability="10.0"),
        dataclasses.replace(HOPPER, dtype="float32"),
        dataclasses.replace(HOPPER, kv_cache_dtype="int8"),
        dataclasses.replace(HOPPER, kv_cache_dtype="fp8"),
        dataclasses.replace(large_pages, kv_cache_dtype="fp8", dtype="float32"),
        dataclasses.replace(HOPPER, head_dim=80),
        dataclasses.replace(HOPPER, page_size=4),
        dataclasses.replace(HOPPER, page_size=24),
    ):
        assert choose_kernel("auto", other) == "xla"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (CPU, "MosaicKernel runs on cuda, but attention is to run on cpu; use attention_kernel='auto'"),
        (dataclasses.replace(HOPPER, compute_capability="8.9"), r"Hopper GPU .* got one of 8\.9; use .*'xla'"),
        (dataclasses.replace(HOPPER, dtype="float32"), "bfloat16 or float16, got float32; set dtype"),
        (
            dataclasses.replace(HOPPER, kv_cache_dtype="fp8"),
            r"for a KV cache of fp8, a page_size that is .* at least 32, got 16; set page_size, or .*'xla'",
        ),
        (dataclasses.replace(HOPPER, head_dim=96), "head_dim of 64, 128, 192 or 256, got 96"),
        (dataclasses.replace(HOPPER, page_size=12), "power of two of at least 8, got 12; set page_size"),
    ],
)
def test_a_kernel_that_was_asked_for_but_does_not_run_is_refused(target, message):
    with pytest.raises(ValueError, match=message):
        choose_kernel("mosaic", target)


def test_a_shape_that_the_mosaic_kernel_cannot_run_is_refused_before_it_is_compiled():
    with pytest.raises(ValueError, match="got float32"):
        run_step(SUBJECTS["mosaic"], World.make(CASES["decode"]))
    with pytest.raises(ValueError, match=r"for a KV cache of int8, a page_size .* at least 32, got 16"):
        run_step(
            SUBJECTS["mosaic"],
            World.make(dataclasses.replace(fitted_to_mosaic(CASES["int8 cache"]), page_size=16)),
        )
    with pytest.raises(ValueError, match="split_tokens must be a positive multiple of 64, got 100"):
        MosaicKernel(split_tokens=100)


@pytest.mark.parametrize(("batch", "context"), [(1, 512), (1, 65536), (16, 4096), (256, 4096), (256, 65536)])
def test_splits_cover_the_context_and_fill_the_device(batch, context):
    kernel = MosaicKernel()
    items = batch * 8
    length = kernel._split(items, context)
    assert length % 64 == 0
    assert 512 <= length <= 16384
    splits = -(-context // length)
    # Enough thread blocks for every multiprocessor to hold two, unless the context is too short to cut further.
    assert splits * items >= 2 * kernel.num_multiprocessors or length == 512
