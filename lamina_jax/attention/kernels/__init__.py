"""Attention kernels by name; a new one is a file here and a line below."""

from lamina_jax.attention.kernels.base import AttentionKernel
from lamina_jax.attention.kernels.xla import XlaKernel

KERNELS: dict[str, type[AttentionKernel]] = {"xla": XlaKernel}


def get_kernel(name: str) -> AttentionKernel:
    """The kernel called `name`. Raises ValueError with the names there are."""
    if name not in KERNELS:
        raise ValueError(f"Unknown attention kernel {name!r}; choose one of {sorted(KERNELS)}.")
    return KERNELS[name]()


__all__ = ["KERNELS", "AttentionKernel", "get_kernel"]
