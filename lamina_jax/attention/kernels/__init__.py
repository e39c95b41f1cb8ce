"""Attention kernels by name; a new one is a file here and a line below."""

from typing import Any

from lamina_jax.attention.kernels.base import AttentionKernel, KernelTarget
from lamina_jax.attention.kernels.mosaic import MosaicKernel
from lamina_jax.attention.kernels.xla import XlaKernel

KERNELS: dict[str, type[AttentionKernel]] = {"xla": XlaKernel, "mosaic": MosaicKernel}
AUTO = "auto"
_PREFERRED = ("mosaic", "xla")
"""The order in which "auto" tries them."""


def check_name(name: str) -> None:
    """Raises ValueError with the names there are unless `name` is one of KERNELS, or "auto"."""
    if name != AUTO and name not in KERNELS:
        raise ValueError(f"Unknown attention kernel {name!r}; choose one of {[AUTO, *sorted(KERNELS)]}.")


def get_kernel(name: str, device: Any) -> AttentionKernel:
    """The kernel called `name`, for a `jax.Device`. Raises ValueError with the names there are."""
    if name not in KERNELS:
        raise ValueError(f"Unknown attention kernel {name!r}; choose one of {sorted(KERNELS)}.")
    return KERNELS[name].on(device)


def choose_kernel(name: str, target: KernelTarget) -> str:
    """The name of the kernel to use where `name` was asked for: that one, or for "auto" the fastest for `target`.

    Raises:
        ValueError: no such kernel, or it does not run there.
    """
    check_name(name)
    if name != AUTO:
        KERNELS[name].check(target)
        return name
    return next(candidate for candidate in _PREFERRED if _runs(candidate, target))


def _runs(name: str, target: KernelTarget) -> bool:
    try:
        KERNELS[name].check(target)
    except ValueError:
        return False
    return True


__all__ = ["AUTO", "KERNELS", "AttentionKernel", "KernelTarget", "check_name", "choose_kernel", "get_kernel"]
