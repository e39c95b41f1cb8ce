"""The conformance suite over the mosaic kernel, natively, on a Hopper GPU."""

import dataclasses

import jax
import pytest

from lamina_jax.attention.kernels import KernelTarget, choose_kernel
from lamina_jax.attention.kernels.mosaic import MosaicKernel
from lamina_jax.testing.attention import CASES, Case, World, check_kernel


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


def _fitted(case: Case) -> Case:
    dtype = "bfloat16" if case.dtype == "float32" else case.dtype
    page_size = max(8, 1 << (case.page_size - 1).bit_length())
    return dataclasses.replace(case, dtype=dtype, page_size=page_size, head_dim=-(-case.head_dim // 64) * 64)


@pytest.mark.parametrize("split_tokens", [64, None])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.is_quantized])
def test_kernel_equals_float64(name, split_tokens):
    check_kernel(MosaicKernel(split_tokens=split_tokens), World.make(_fitted(CASES[name])))


@pytest.mark.parametrize("name", BIG)
def test_kernel_equals_float64_on_big_shapes(name):
    check_kernel(MosaicKernel(), World.make(BIG[name]))


def test_auto_is_this_kernel_here():
    target = KernelTarget.of_device(jax.local_devices()[0], dtype="bfloat16", head_dim=128, page_size=16)
    assert choose_kernel("auto", target) == "mosaic"
