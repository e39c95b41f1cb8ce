"""Channels between workers, and the XLA operations that send and receive through them."""

from lamina_jax.transport.base import (
    Channel,
    ChannelAddress,
    ChannelError,
    MessageSpec,
    Role,
    Tag,
    attach,
    channel_class,
    channel_kinds,
    first_failure,
)
from lamina_jax.transport.ops import Stamp, fence, make_stamp, recv, send
from lamina_jax.transport.shm import ShmChannel

__all__ = [
    "Channel",
    "ChannelAddress",
    "ChannelError",
    "MessageSpec",
    "Role",
    "ShmChannel",
    "Stamp",
    "Tag",
    "attach",
    "channel_class",
    "channel_kinds",
    "fence",
    "first_failure",
    "make_stamp",
    "recv",
    "send",
]
