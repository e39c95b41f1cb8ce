"""What every kind of channel offers: the contract, the messages and the list of kinds."""

import abc
import dataclasses
import enum
import importlib
import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import msgspec

Role = Literal["writer", "reader"]

TENSOR_ALIGNMENT = 64
"""Bytes. Every tensor of a message starts on a multiple of this."""

MESSAGE_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16), jnp.dtype(jnp.float32), jnp.dtype(jnp.int32))


class Tag(enum.IntEnum):
    """What a message carries. Both ends name it; a message with another tag than the one awaited is an error."""

    Q = 1
    KV = 2
    ATTENDED = 3
    CONTEXT = 4  # values that migrate between replicas of the model worker

    @property
    def label(self) -> str:
        """The name that error messages use."""
        return self.name.lower()


class ChannelError(RuntimeError):
    """A channel failed: its peer died, it was aborted, a wait took too long or an unexpected message came.

    Attributes:
        peer: The name of the other end, as given when this end was made.
    """

    def __init__(self, message: str, *, peer: str):
        super().__init__(message)
        self.peer = peer


@dataclasses.dataclass(frozen=True)
class MessageSpec:
    """The tensors of one message.

    Attributes:
        tag: What the message carries.
        tensors: Shape and dtype (bfloat16, float16, float32 or int32) of every tensor, in order.
    """

    tag: Tag
    tensors: tuple[jax.ShapeDtypeStruct, ...]

    def __post_init__(self) -> None:
        for i, tensor in enumerate(self.tensors):
            if tensor.dtype not in MESSAGE_DTYPES:
                allowed = ", ".join(dtype.name for dtype in MESSAGE_DTYPES)
                raise ValueError(
                    f"tensor {i} of {self.tag.label!r} has dtype {tensor.dtype.name}; a message carries {allowed}"
                )

    @property
    def nbytes(self) -> int:
        """Bytes that the message takes in a slot: every tensor padded to a multiple of 64."""
        return sum(_aligned(math.prod(tensor.shape) * tensor.dtype.itemsize) for tensor in self.tensors)

    def require_fits(self, slot_bytes: int) -> None:
        """Raises ValueError if the message does not fit a slot of that many bytes."""
        if self.nbytes > slot_bytes:
            tensors = ", ".join(f"{tensor.dtype.name}{list(tensor.shape)}" for tensor in self.tensors)
            raise ValueError(
                f"message {self.tag.label!r} ({tensors}) takes {self.nbytes} bytes and a slot of the channel has "
                f"{slot_bytes}; make the channel with a larger slot_bytes or list this message when you create it"
            )


class ChannelAddress(msgspec.Struct, frozen=True, kw_only=True):
    """How the other end finds a channel, or the creator the other end (`Channel.answer`). Plain data, to be sent over a
    control connection.

    Attributes:
        kind: The kind of channel, e.g. "shm".
        location: Where it is; its meaning is up to the kind.
        num_slots: Messages that the ring holds.
        slot_bytes: Bytes of tensors that one slot holds.
        creator_role: The end that the creator took; the other one is free.
    """

    kind: str
    location: str
    num_slots: int
    slot_bytes: int
    creator_role: Role


class Channel(abc.ABC):
    """One end of a one-way bounded ring of messages between two processes.

    Messages arrive once and in order. `ops.send` and `ops.recv` move them inside XLA programs; a channel only says how
    to reach those.

    One process creates the channel and sends its `address` to the other, which attaches and sends its `answer` back,
    with which the creator connects. Kinds whose creator has to know nothing of the other end, like shared memory, have
    no answer and no need of `connect`; whoever handles channels of any kind makes all three steps:

        creator:  channel = SomeChannel.create(...)                     send channel.address
        peer:     channel = attach(address, ...)                        send channel.answer
        creator:  channel.connect(answer)                               from now on both may send and receive

    A kind of channel has to keep these promises:

    - Every wait ends: with a message, when the peer dies (within two seconds), on `abort` or `close` of either end, or
      after `timeout_s`. All but the first are errors that name operation, tag, step, layer, batch and peer.
    - What the writer had sent completely before it died or closed is still delivered. From when on a message is sent, a
      kind says of itself.
    - The first failure is final: both ends fail from then on, at once.
    - `abort` and `close` may be called from any thread, also while an operation is waiting.
    """

    needs_answer: ClassVar[bool] = False
    """Whether the creator has to `connect` to the other end's `answer`. A kind that sets this overrides `answer` and
    `_connect`."""

    def __init__(
        self,
        *,
        role: Role,
        peer: str,
        num_slots: int,
        slot_bytes: int,
        device: int | None = None,
        attached: bool = False,
    ):
        """Args:
        device: ordinal of the one JAX device whose programs use this end; None for any.
        attached: whether this end was made by `attach` and so knows the creator's already.
        """
        self._connected = attached or not self.needs_answer
        self.device = device
        self.role: Role = role
        self.peer = peer
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes

    @classmethod
    @abc.abstractmethod
    def create(
        cls,
        *,
        role: Role,
        peer: str,
        messages: Sequence[MessageSpec],
        num_slots: int = 8,
        slot_bytes: int | None = None,
        timeout_s: float = 60.0,
    ) -> "Channel":
        """Makes a channel and takes one end of it.

        Args:
            role: The end to take.
            peer: What errors call the other end, e.g. "attention worker 1".
            messages: Every message that will travel. Each must fit a slot.
            num_slots: Messages in flight before a send waits. Over verbs it may wait with a quarter of them in flight,
                as the reader gives slots back several at a time.
            slot_bytes: Bytes of tensors per slot; None takes the largest of `messages`.
            timeout_s: Seconds that one send or recv waits at most.

        Raises:
            ValueError: A message does not fit, or an argument is out of range.
            OSError: The machine refuses the memory or the connection.
        """

    @classmethod
    @abc.abstractmethod
    def attach(cls, address: ChannelAddress, *, role: Role, peer: str, timeout_s: float = 60.0) -> "Channel":
        """Takes the other end of a channel that a peer created. If that has an `answer`, no program may use either end
        before the creator has connected to it.

        Raises:
            ValueError: What lies at the address is not what the address says, or that end is taken.
            OSError: The address cannot be opened; the creator must still be alive.
        """

    @property
    @abc.abstractmethod
    def address(self) -> ChannelAddress:
        """What the peer passes to `attach`, while the creator keeps the channel open. The same at both ends."""

    @property
    def answer(self) -> ChannelAddress | None:
        """What the creator passes to `connect`: the address with this end's location in place of the creator's. None
        if the creator needs nothing, and at the creator's end."""
        return None

    def connect(self, answer: ChannelAddress | None) -> None:
        """Takes what the other end had as its `answer`; the creator's last step.

        Raises:
            ValueError: The answer is missing, unasked for, given a second time, or not that of this channel's peer.
            OSError: The connection is refused.
        """
        if answer is None and not self.needs_answer:
            return
        kind, own = self.address.kind, self.address
        if not self.needs_answer:
            raise ValueError(
                f"expected no answer of {self.peer}, as a channel of kind {kind!r} needs none; got {answer}"
            )
        if self._connected:
            raise ValueError(f"the channel of kind {kind!r} to {self.peer} is connected already")
        if answer is None:
            raise ValueError(
                f"expected {self.peer} to answer how to reach its end of a channel of kind {kind!r}, got none"
            )
        for name in ("kind", "num_slots", "slot_bytes", "creator_role"):
            mine, theirs = getattr(own, name), getattr(answer, name)
            if mine != theirs:
                raise ValueError(
                    f"{self.peer} answered for another channel than the one of kind {kind!r} that it was given: "
                    f"expected {name} {mine!r}, got {theirs!r}"
                )
        self._connect(answer)
        self._connected = True

    def _connect(self, answer: ChannelAddress) -> None:
        """What `connect` does for this kind with an answer whose kind and sizes are right; raises as `connect` does."""
        raise NotImplementedError(f"{type(self).__name__} needs an answer and does not say what to do with it")

    @property
    def connected(self) -> bool:
        """Whether programs may use this end: always, unless it still needs its peer's answer."""
        return self._connected

    @property
    @abc.abstractmethod
    def id(self) -> int:
        """The number by which compiled programs of this process name the channel.

        Once it is closed another one may have its number: programs that name a closed channel must not run.
        """

    @property
    def in_programs(self) -> tuple[Hashable, ...]:
        """All that a compiled program has of this end: it may use a later one of which this is equal."""
        return (type(self), self.id, self.device, self.role, self.slot_bytes)

    @property
    @abc.abstractmethod
    def targets(self) -> dict[Literal["send", "recv"], str]:
        """The names of the XLA custom calls that move messages."""

    @property
    @abc.abstractmethod
    def peer_pid(self) -> int | None:
        """The process at the other end; None while no one has attached, and where it may be on another host."""

    @property
    @abc.abstractmethod
    def closed(self) -> bool:
        """Whether `close` was called."""

    @property
    @abc.abstractmethod
    def failure(self) -> str | None:
        """The first failure of this end, in words, or None. Kept after `close`."""

    @abc.abstractmethod
    def abort(self) -> None:
        """Makes every operation of both ends fail, those that wait now and all later ones."""

    @abc.abstractmethod
    def close(self) -> None:
        """Gives the channel up. The peer may still receive what was sent; an operation that waits here fails."""

    def error(self) -> ChannelError | None:
        """The first failure of this end as an exception to raise, or None."""
        return None if self.failure is None else ChannelError(self.failure, peer=self.peer)

    def __enter__(self) -> "Channel":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def first_failure(channels: Iterable[Channel]) -> ChannelError | None:
    """The failure of the first channel that failed, as an exception to raise, or None."""
    return next((error for channel in channels if (error := channel.error()) is not None), None)


_KINDS = {
    "shm": "lamina_jax.transport.shm:ShmChannel",
    "tcp": "lamina_jax.transport.tcp:TcpChannel",
    "verbs": "lamina_jax.transport.verbs:VerbsChannel",
    "cuda_host": "lamina_jax.transport.cuda:CudaHostChannel",
    "cuda_ipc": "lamina_jax.transport.cuda:CudaIpcChannel",
    "gda": "lamina_jax.transport.gda:GdaChannel",
}


def channel_kinds() -> tuple[str, ...]:
    """The names that `channel_class` knows."""
    return tuple(_KINDS)


def channel_class(kind: str) -> type[Channel]:
    """The class of a kind of channel, imported on first use.

    Raises:
        ValueError: There is no such kind.
    """
    if kind not in _KINDS:
        raise ValueError(f"unknown kind of channel {kind!r}; supported: {', '.join(_KINDS)}")
    module, name = _KINDS[kind].split(":")
    return getattr(importlib.import_module(module), name)


def attach(address: ChannelAddress, *, role: Role, peer: str, timeout_s: float = 60.0, **options: Any) -> Channel:
    """Takes the free end of the channel at `address`, of whatever kind it is; see `Channel.attach`.

    Args:
        address: What the creator sent.
        role: The end to take.
        peer: What errors call the other end.
        timeout_s: Seconds that one send or recv waits at most.
        **options: What else this kind of channel takes, e.g. `spin_us` of shm, `device` of cuda_host.
    """
    return channel_class(address.kind).attach(address, role=role, peer=peer, timeout_s=timeout_s, **options)


def slot_room(messages: Sequence[MessageSpec], *, num_slots: int, slot_bytes: int | None) -> int:
    """Bytes per slot as `Channel.create` was asked for them: `slot_bytes`, or what the largest message takes.

    Raises:
        ValueError: A size is not positive or a message does not fit.
    """
    room = largest_message(messages) if slot_bytes is None else slot_bytes
    if num_slots < 1 or room < 1:
        raise ValueError(f"num_slots and slot_bytes must be at least 1, got {num_slots} and {room}")
    for message in messages:
        message.require_fits(room)
    return _aligned(room)


def require_kind(address: ChannelAddress, kind: str) -> None:
    """Raises ValueError unless the address is that of a channel of this kind."""
    if address.kind != kind:
        raise ValueError(f"expected an address of kind {kind!r}, got {address.kind!r}")


def require_wait(timeout_s: float, spin_us: float = 0.0) -> None:
    """Raises ValueError unless an operation may wait for that long."""
    if timeout_s <= 0 or spin_us < 0:
        raise ValueError(f"timeout_s must be positive and spin_us not negative, got {timeout_s} and {spin_us}")


def largest_message(messages: Sequence[MessageSpec]) -> int:
    """Bytes of the largest message, at least one aligned tensor's worth."""
    return max((message.nbytes for message in messages), default=0) or TENSOR_ALIGNMENT


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
