"""How XLA should compile the programs of workers on GPUs."""

from typing import Any, Final

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
