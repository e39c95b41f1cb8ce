"""A slice as a function to compile: the converter's program with its sends, receives and fences in their order."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lamina_jax import partition
from lamina_jax.runtime.stamps import next_layer, next_step
from lamina_jax.transport import Channel, Tag, fence, recv, send


@dataclasses.dataclass(frozen=True)
class Heads:
    """One worker's contiguous share of the heads."""

    q: slice
    kv: slice

    @property
    def num_q(self) -> int:
        """Query heads of the share."""
        return self.q.stop - self.q.start

    @property
    def num_kv(self) -> int:
        """KV heads of the share."""
        return self.kv.stop - self.kv.start


def split_heads(num_heads: int, num_kv_heads: int, num_workers: int) -> list[Heads]:
    """Contiguous shares of the KV heads, and the query heads that read them, as even as they go.

    Raises:
        ValueError: there are more workers than KV heads.
    """
    if num_workers > num_kv_heads:
        raise ValueError(
            f"num_attention_workers is {num_workers}, but the model has only {num_kv_heads} KV heads to divide; "
            f"use at most {num_kv_heads} attention workers."
        )
    group = num_heads // num_kv_heads
    bounds = [worker * num_kv_heads // num_workers for worker in range(num_workers + 1)]
    return [Heads(slice(a * group, b * group), slice(a, b)) for a, b in itertools.pairwise(bounds)]


@dataclasses.dataclass(frozen=True)
class SlicePlan:
    """A compiled slice but for the weights: slices with equal plans share it."""

    program: int
    """Index into `Partition.programs`."""
    given: tuple[jax.ShapeDtypeStruct, ...]
    """Values that the caller passes in."""
    received: tuple[jax.ShapeDtypeStruct, ...]
    """Values that the replica of the slice before sends; none where batches do not move."""
    reads: tuple[int, ...]
    """Where the program's reads are among the values given and received."""
    sent: tuple[int, ...]
    """Where the values for the next replica are among those and the program's writes."""
    returns: bool
    """Whether the writes go back to the caller."""


def plan_slice(parts: partition.Partition, k: int, *, moves: bool) -> SlicePlan:
    """The plan of slice `k`.

    Args:
        parts: the cut model.
        moves: whether a batch's next slice runs on another replica.
    """
    this, last = parts.slices[k], k == len(parts.slices) - 1
    given = tuple(range(parts.num_inputs)) if moves else this.reads
    received = parts.slices[k - 1].context if moves and k else ()
    at_hand = (*given, *received)
    return SlicePlan(
        program=this.program,
        given=tuple(parts.values[i] for i in given),
        received=tuple(parts.values[i] for i in received),
        reads=tuple(at_hand.index(i) for i in this.reads),
        sent=tuple((*at_hand, *this.writes).index(i) for i in this.context) if moves and not last else (),
        returns=last or not moves,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlicePorts:
    """The channels of a slice on one replica, and how the heads are shared among the attention workers."""

    shares: Sequence[Heads]
    """By worker."""
    down: Sequence[Sequence[Channel]]
    """By worker the writing ends of q, k and v, by batch."""
    up: Sequence[Sequence[Channel]]
    """By worker the reading ends of the attention's output, by batch."""
    head_dim: int
    dtype: jnp.dtype
    """Of q, k, v and the attention's output."""
    overlap: bool = True
    """Send q before k and v are computed, so that attention over the cache starts meanwhile."""
    context_in: Sequence[Channel] = ()
    """Reading ends from the replica of the slice before, by batch; none where batches do not move."""
    context_out: Sequence[Channel] = ()
    """Writing ends to the replica of the next slice, by batch."""

    def function(self, program: partition.SliceProgram, plan: SlicePlan, batch: int, tokens: int):
        """``f(weights, given, stamp) -> (writes, stamp)``, to be compiled for a step of [batch, tokens]."""
        return functools.partial(_run_slice, self, program, plan, (batch, tokens))

    def q_shape(self, share: Heads, batch: int, tokens: int) -> jax.ShapeDtypeStruct:
        """A worker's part of q, and of the attention's output."""
        return jax.ShapeDtypeStruct((batch, tokens, share.num_q, self.head_dim), self.dtype)

    def kv_shape(self, share: Heads, batch: int, tokens: int) -> jax.ShapeDtypeStruct:
        """A worker's part of k, and of v."""
        return jax.ShapeDtypeStruct((batch, tokens, share.num_kv, self.head_dim), self.dtype)

    def send_heads(self, stamp: jax.Array, tensors: Sequence[jax.Array], tag: Tag) -> jax.Array:
        """Sends every worker its heads of each tensor; returns the stamp."""
        for channels, share in zip(self.down, self.shares, strict=True):
            heads = share.q if tag is Tag.Q else share.kv
            stamp = send(channels, stamp, [x[:, :, heads] for x in tensors], tag=tag)
        return stamp

    def recv_attended(self, batch: int, tokens: int, stamp: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The attention's output of all workers, [batch, tokens, num_heads, head_dim], and the stamp."""
        parts = []
        for channels, share in zip(self.up, self.shares, strict=True):
            (part,), stamp = recv(channels, stamp, [self.q_shape(share, batch, tokens)], tag=Tag.ATTENDED)
            parts.append(part)
        return jnp.concatenate(parts, axis=2), stamp


def _run_slice(
    channels: SlicePorts,
    program: partition.SliceProgram,
    plan: SlicePlan,
    shape: tuple[int, int],
    weights: Sequence[jax.Array],
    given: Sequence[jax.Array],
    stamp: jax.Array,
) -> tuple[list[jax.Array], jax.Array]:
    at_hand = list(given)
    if program.attended is None:
        stamp = next_step(stamp)
    if plan.received:
        received, stamp = recv(channels.context_in, stamp, plan.received, tag=Tag.CONTEXT)
        at_hand += received

    def recv_attended() -> jax.Array:
        nonlocal stamp
        attended, stamp = channels.recv_attended(*shape, stamp)
        stamp = next_layer(stamp)
        return attended

    held: list[jax.Array] = []

    def send_q(q: jax.Array) -> None:
        nonlocal stamp
        if channels.overlap:
            stamp = channels.send_heads(stamp, [q], Tag.Q)
        else:
            held.append(q)

    def send_kv(k: jax.Array, v: jax.Array) -> None:
        nonlocal stamp
        if not channels.overlap:
            stamp = channels.send_heads(stamp, held, Tag.Q)
        stamp = channels.send_heads(stamp, [k, v], Tag.KV)

    def keep_order(values: list[jax.Array]) -> list[jax.Array]:
        nonlocal stamp
        stamp, values = fence(stamp, values)
        return values

    ports = partition.Ports(recv=recv_attended, send_q=send_q, send_kv=send_kv, fence=keep_order)
    writes = program.run(weights, [at_hand[i] for i in plan.reads], ports)
    if plan.sent:
        at_hand += writes
        stamp = send(channels.context_out, stamp, [at_hand[i] for i in plan.sent], tag=Tag.CONTEXT)
    # The stamp goes out too, or XLA would drop the sends.
    return (writes if plan.returns else []), stamp
