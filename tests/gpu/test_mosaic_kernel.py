"""The conformance suite over the mosaic kernel, natively, on a Hopper GPU."""

import dataclasses

import jax
import pytest

from lamina_jax.attention.kernels import KernelTarget, choose_kernel
from lamina_jax.attention.kernels.mosaic import MosaicKernel
from lamina_jax.testing.attention import CASES, Case, World, check_kernel, fitted_to_mosaic


@pytest.fixture(autouse=True)
def on_hopper():
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    if jax.default_backend() != "gpu" or not capability.startswith("9."):
        pytest.skip("needs a Hopper GPU, and the environment variable LAMINA_TEST_PLATFORM=cuda,cpu")


# With this scale a few tokens have most of the weight: with scores alike, the output of a long context would be near
# zero whatever the kernel does.
LLAMA_70B = Case(
    (8192, 1, 4097, 0, 64, 700), (1,) * 6, num_heads=16, head_dim=128, page_size=16, dtype="bfloat16", scale=0.5
)
BIG = {
    "a quarter of LLaMA-3-70B": LLAMA_70B,
    "long and short contexts": dataclasses.replace(LLAMA_70B, context_lens=(65536, 3, 17), num_new=(1, 1, 1)),
    "float16": dataclasses.replace(LLAMA_70B, dtype="float16"),
    "window": dataclasses.replace(LLAMA_70B, window=4096),
    "soft cap": dataclasses.replace(LLAMA_70B, soft_cap=50.0, window=1000),
    "prefill of a later piece": dataclasses.replace(LLAMA_70B, num_new=(40, 33, 1, 7, 64, 2)),
    "mqa": dataclasses.replace(LLAMA_70B, num_heads=8, num_kv_heads=1),
    "mha": dataclasses.replace(LLAMA_70B, num_heads=8, num_kv_heads=8),
    "group of 7": dataclasses.replace(LLAMA_70B, num_heads=14),
    "heads of 64": dataclasses.replace(LLAMA_70B, head_dim=64),
    "heads of 256": dataclasses.replace(LLAMA_70B, head_dim=256, num_new=(1, 2, 3, 4, 5, 6)),
    "pages of 8": dataclasses.replace(LLAMA_70B, page_size=8),
    "pages of 256": dataclasses.replace(LLAMA_70B, page_size=256),
}
INT8, FP8 = (dataclasses.replace(LLAMA_70B, page_size=32, kv_cache_dtype=kind) for kind in ("int8", "fp8"))
BIG |= {
    "int8 cache": INT8,
    "fp8 cache": FP8,
    "int8 cache, float16": dataclasses.replace(INT8, dtype="float16"),
    "fp8 cache, float16": dataclasses.replace(FP8, dtype="float16"),
    "int8 cache, prefill of a later piece": dataclasses.replace(INT8, num_new=(40, 33, 1, 7, 64, 2)),
    "fp8 cache, window and soft cap": dataclasses.replace(FP8, soft_cap=50.0, window=1000),
    "int8 cache, heads of 64": dataclasses.replace(INT8, head_dim=64),
    "fp8 cache, heads of 192": dataclasses.replace(FP8, head_dim=192, num_new=(1, 2, 3, 4, 5, 6)),
    "int8 cache, heads of 256": dataclasses.replace(INT8, head_dim=256, num_new=(1, 2, 3, 4, 5, 6)),
    "fp8 cache, pages of 64": dataclasses.replace(FP8, page_size=64),
    "int8 cache, pages of 256": dataclasses.replace(INT8, page_size=256),
}


@pytest.mark.parametrize("split_tokens", [64, None])
@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_float64(name, split_tokens):
    check_kernel(MosaicKernel(split_tokens=split_tokens), World.make(fitted_to_mosaic(CASES[name])))


@pytest.mark.parametrize("name", BIG)
def test_kernel_equals_float64_on_big_shapes(name):
    check_kernel(MosaicKernel(), World.make(BIG[name]))


def test_auto_is_this_kernel_here():
    for kind in ("auto", "int8", "fp8"):
        cache = {"dtype": "bfloat16", "kv_cache_dtype": kind, "head_dim": 128, "page_size": 32}
        assert choose_kernel("auto", KernelTarget.of_device(jax.local_devices()[0], **cache)) == "mosaic"
