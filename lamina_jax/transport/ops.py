"""Send and receive inside XLA programs.

XLA is free to reorder custom calls that do not depend on each other. What orders these is the stamp: each operation
takes the stamp that the one before it returned, so a program keeps its sends and receives in the order in which they
were written, across scans and jit boundaries too.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from lamina_jax.transport.base import Channel, MessageSpec, Role, Tag

Stamp = Int32[Array, "2"]
"""[step, layer] of the message. Travels with it and is compared on arrival."""


def make_stamp(step: int | Int32[Array, ""], layer: int | Int32[Array, ""] = 0) -> Stamp:
    """A stamp from which a chain of sends and receives can start."""
    return jnp.stack([jnp.asarray(step, jnp.int32), jnp.asarray(layer, jnp.int32)])


def send(channel: Channel, stamp: Stamp, tensors: Sequence[Array], *, tag: Tag) -> Stamp:
    """Sends tensors as one message; waits while the ring is full.

    Args:
        channel: The writing end.
        stamp: [step, layer], as the operation before returned it.
        tensors: What to send: bfloat16, float16, float32 or int32, of any shapes.
        tag: What the message carries.

    Returns:
        The stamp, to pass to the next operation.

    Raises:
        ValueError: When traced: wrong end, closed channel, a dtype that does not travel, or too large a message.
        jax.errors.JaxRuntimeError: When run: the channel failed; `channel.error()` says how.
    """
    _check(channel, "writer", stamp, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in tensors], tag)
    call = jax.ffi.ffi_call(channel.targets["send"], _struct(stamp), has_side_effect=True)
    return call(stamp, *tensors, channel=np.int64(channel.id), tag=np.int32(tag))


def recv(
    channel: Channel, stamp: Stamp, specs: Sequence[jax.ShapeDtypeStruct], *, tag: Tag
) -> tuple[tuple[Array, ...], Stamp]:
    """Receives one message; waits until it is there. The message must have exactly this stamp, tag and tensors.

    Args:
        channel: The reading end.
        stamp: [step, layer] of the message awaited, as the operation before returned it.
        specs: Shapes and dtypes of the tensors awaited.
        tag: What the message must carry.

    Returns:
        The tensors, and the stamp to pass to the next operation.

    Raises:
        ValueError: When traced: wrong end, closed channel, a dtype that does not travel, or too large a message.
        jax.errors.JaxRuntimeError: When run: the channel failed; `channel.error()` says how.
    """
    _check(channel, "reader", stamp, specs, tag)
    call = jax.ffi.ffi_call(channel.targets["recv"], (_struct(stamp), *specs), has_side_effect=True)
    stamp, *tensors = call(stamp, channel=np.int64(channel.id), tag=np.int32(tag))
    return tuple(tensors), stamp


def _struct(stamp: Stamp) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(stamp.shape, stamp.dtype)


def _check(channel: Channel, role: Role, stamp: Stamp, specs: Sequence[jax.ShapeDtypeStruct], tag: Tag) -> None:
    if channel.closed:
        raise ValueError(f"the channel to {channel.peer} is closed; make a new one")
    if channel.role != role:
        raise ValueError(f"expected the {role}'s end of the channel, got the {channel.role}'s (peer {channel.peer})")
    if stamp.shape != (2,) or stamp.dtype != jnp.int32:
        raise ValueError(f"stamp must be int32 of shape (2,), got {stamp.dtype} of shape {stamp.shape}")
    MessageSpec(tag=tag, tensors=tuple(specs)).require_fits(channel.slot_bytes)
