"""How JAX and XLA should compile the programs of workers on GPUs."""

import contextlib
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

GPU_COMPILER_OPTIONS: Final[dict[str, Any]] = {
    # Else XLA joins the products of k and v, and to do so copies both weights into one array in every step: twice the
    # memory traffic of the products themselves.
    "xla_gpu_dot_merger_threshold_mb": 0,
    # It counts a donated KV cache twice, finds the device's memory exceeded, and does attention's gathers and the
    # appends to the cache several times, to save memory that is not missing.
    "xla_disable_hlo_passes": "rematerialization",
    # What CUDA graphs record: XLA's defaults and COLLECTIVES, without which a slice falls apart at its sums over
    # devices.
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,DYNAMIC_SLICE_FUSION,COLLECTIVES"
    ),
}
"""For ``compiler_options`` of ``jax.stages.Lowered.compile``."""


def compiler_options(platform: str) -> dict[str, Any] | None:
    """The options for programs of a device of this `jax.Device.platform`, None where XLA's defaults do."""
    return GPU_COMPILER_OPTIONS if platform == "gpu" else None


def exact_products(platform: str, dtype: DTypeLike) -> contextlib.AbstractContextManager[None]:
    """Programs traced in this context multiply float32 as float32.

    Otherwise JAX lets a GPU's tensor cores round the factors to TF32, 10 bits of mantissa, so that who asks for float32
    would not get the tokens that a CPU computes.

    Args:
        platform: of the `jax.Device` that runs the programs; only "gpu" needs anything.
        dtype: of weights and activations; only for float32 is anything done.
    """
    if platform != "gpu" or jnp.dtype(dtype) != jnp.float32:
        return contextlib.nullcontext()
    return jax.default_matmul_precision("highest")
