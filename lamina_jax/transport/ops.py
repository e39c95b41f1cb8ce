"""Send and receive inside XLA programs.

XLA is free to reorder custom calls that do not depend on each other. What orders these is the stamp: each operation
takes the stamp that the one before it returned, so a program keeps its sends and receives in the order in which they
were written, across scans and jit boundaries too.

The stamp also says which batch a message belongs to, and each batch has channels of its own: a program is compiled once
for all batches, and every run takes the channels of the batch in its stamp. A program that several devices run, under
`jax.shard_map`, names the channels of all of them, and each device takes its own.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from lamina_jax import _custom_calls
from lamina_jax.transport.base import Channel, MessageSpec, Role, Tag

FENCE = "lamina_fence"
jax.ffi.register_ffi_target(FENCE, _custom_calls.fence_handler(), platform="cpu")

Stamp = Int32[Array, "3"]
"""[step, layer, batch] of the message. Travels with it and is compared on arrival."""

_OPERATIONS: dict[Role, Literal["send", "recv"]] = {"writer": "send", "reader": "recv"}


def make_stamp(
    step: int | Int32[Array, ""], layer: int | Int32[Array, ""] = 0, batch: int | Int32[Array, ""] = 0
) -> Stamp:
    """A stamp from which a chain of sends and receives can start."""
    return jnp.stack([jnp.asarray(value, jnp.int32) for value in (step, layer, batch)])


def send(channels: Sequence[Channel], stamp: Stamp, tensors: Sequence[Array], *, tag: Tag) -> Stamp:
    """Sends tensors as one message; waits while the ring is full.

    Args:
        channels: The writing ends, by batch, all of one kind and to one peer; where several devices run the program,
            those of each device (`Channel.device`).
        stamp: [step, layer, batch], as the operation before returned it.
        tensors: What to send: bfloat16, float16, float32 or int32, of any shapes.
        tag: What the message carries.

    Returns:
        The stamp, to pass to the next operation, and from the last one out of the program: XLA drops a call whose
        results nobody uses.

    Raises:
        ValueError: When traced: wrong end, closed or not connected channel, a dtype that does not travel, too large a
            message, or channels that do not go together.
        jax.errors.JaxRuntimeError: When run: the stamp's batch has no channel, or it failed (`error()` says how).
    """
    _check(channels, "writer", stamp, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in tensors], tag)
    call = jax.ffi.ffi_call(channels[0].targets["send"], _struct(stamp))
    return call(stamp, *tensors, channels=_ids(channels), tag=np.int32(tag))


def recv(
    channels: Sequence[Channel], stamp: Stamp, specs: Sequence[jax.ShapeDtypeStruct], *, tag: Tag
) -> tuple[tuple[Array, ...], Stamp]:
    """Receives one message; waits until it is there. The message must have exactly this stamp, tag and tensors.

    Args:
        channels: The reading ends, by batch, all of one kind and from one peer; where several devices run the program,
            those of each device (`Channel.device`).
        stamp: [step, layer, batch] of the message awaited, as the operation before returned it.
        specs: Shapes and dtypes of the tensors awaited.
        tag: What the message must carry.

    Returns:
        The tensors, and the stamp to pass to the next operation.

    Raises:
        ValueError: When traced: wrong end, closed or not connected channel, a dtype that does not travel, too large a
            message, or channels that do not go together.
        jax.errors.JaxRuntimeError: When run: the stamp's batch has no channel, or it failed (`error()` says how).
    """
    _check(channels, "reader", stamp, specs, tag)
    call = jax.ffi.ffi_call(channels[0].targets["recv"], (_struct(stamp), *specs))
    stamp, *tensors = call(stamp, channels=_ids(channels), tag=np.int32(tag))
    return tuple(tensors), stamp


def fence(stamp: Stamp, values: Sequence[Array]) -> tuple[Stamp, list[Array]]:
    """The same stamp and values, each of them only there when all are.

    What is computed from the values comes after the messages that made the stamp, and messages with the new stamp come
    after the values. `jax.lax.optimization_barrier` does not do: XLA drops it before it runs a program on the CPU.
    """
    shapes = [_struct(stamp), *(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in values)]
    call = jax.ffi.ffi_call(FENCE, shapes, input_output_aliases={i: i for i in range(len(shapes))})
    stamp, *values = call(stamp, *values)
    return stamp, list(values)


def _struct(stamp: Stamp) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(stamp.shape, stamp.dtype)


def _ids(channels: Sequence[Channel]) -> np.ndarray:
    return np.asarray([channel.id for channel in channels], np.int64)


def _check(
    channels: Sequence[Channel], role: Role, stamp: Stamp, specs: Sequence[jax.ShapeDtypeStruct], tag: Tag
) -> None:
    if stamp.shape != (3,) or stamp.dtype != jnp.int32:
        raise ValueError(f"stamp must be int32 of shape (3,), got {stamp.dtype} of shape {stamp.shape}")
    if not channels:
        raise ValueError("expected a channel for every batch, got none")
    for channel in channels:
        _check_channel(channel, role, MessageSpec(tag=tag, tensors=tuple(specs)))
    ends = {(channel.peer, channel.targets[_OPERATIONS[role]]) for channel in channels}
    if len(ends) > len({channel.device for channel in channels}):
        peers = ", ".join(f"{peer} ({target})" for peer, target in sorted(ends))
        raise ValueError(
            f"expected the channels of all batches of a device to be of one kind and to have one peer, got {peers}"
        )


def _check_channel(channel: Channel, role: Role, message: MessageSpec) -> None:
    if channel.closed:
        raise ValueError(f"the channel to {channel.peer} is closed; make a new one")
    if not channel.connected:
        raise ValueError(
            f"the channel to {channel.peer} is not connected: pass what the other end has as its answer to connect()"
        )
    if channel.role != role:
        raise ValueError(f"expected the {role}'s end of the channel, got the {channel.role}'s (peer {channel.peer})")
    message.require_fits(channel.slot_bytes)
