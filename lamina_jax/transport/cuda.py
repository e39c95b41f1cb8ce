"""Channels of GPUs: to a CPU worker of the same host through pinned memory, and to another GPU of the host.

Importing this module registers the custom calls of `platform="CUDA"`. That needs no GPU, so programs can be compiled
ahead of time; making a GPU's end does.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import ClassVar, Literal

import jax

from lamina_jax import _custom_calls
from lamina_jax.transport.base import Channel, ChannelAddress, MessageSpec, Role, Tag, largest_message
from lamina_jax.transport.ops import FENCE
from lamina_jax.transport.shm import ShmChannel

SEND, RECV = "lamina_cuda_send", "lamina_cuda_recv"
"""The custom calls of every GPU's end."""


def _load_calls() -> ModuleType | None:
    """The compiled part, registered with XLA; None where it was not built."""
    try:
        calls = importlib.import_module("lamina_jax._cuda_calls")
    except ModuleNotFoundError:
        return None
    jax.ffi.register_ffi_target(SEND, calls.send_handler(), platform="CUDA")
    jax.ffi.register_ffi_target(RECV, calls.recv_handler(), platform="CUDA")
    jax.ffi.register_ffi_target(FENCE, calls.fence_handler(), platform="CUDA")
    for tag in Tag:
        calls.name_tag(int(tag), tag.label)
    return calls


_calls = _load_calls()


def cuda_calls_built() -> bool:
    """Whether this installation has the custom calls of CUDA; the build takes them along where it finds nvcc."""
    return _calls is not None
