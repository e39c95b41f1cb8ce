"""Channels through shared memory, between two processes of one host."""

from collections.abc import Sequence
from typing import Literal

from lamina_jax import _custom_calls
from lamina_jax.transport.base import (
    Channel,
    ChannelAddress,
    MessageSpec,
    Role,
    require_kind,
    require_wait,
    slot_room,
)
from lamina_jax.transport.cpu_calls import DEFAULT_SPIN_US, TARGETS


class ShmChannel(Channel):
    """A ring in shared memory that never has a name, so that nothing stays in /dev/shm whatever happens.

    Make one with `create` in one process, send its `address` to the other, and `attach` there as the same user.
    """

    def __init__(
        self,
        handle: _custom_calls.ShmHandle,
        address: ChannelAddress,
        *,
        role: Role,
        peer: str,
        device: int | None = None,
    ):
        super().__init__(
            role=role, peer=peer, num_slots=address.num_slots, slot_bytes=address.slot_bytes, device=device
        )
        self._handle = handle
        self._address = address

    @classmethod
    def create(
        cls,
        *,
        role: Role,
        peer: str,
        messages: Sequence[MessageSpec],
        num_slots: int = 8,
        slot_bytes: int | None = None,
        timeout_s: float = 60.0,
        spin_us: float = DEFAULT_SPIN_US,
        device: int | None = None,
    ) -> "ShmChannel":
        """Makes the ring and reserves its memory; see `Channel.create`.

        Args:
            role: The end to take.
            peer: What errors call the other end.
            messages: Every message that will travel.
            num_slots: Messages in flight before a send waits.
            slot_bytes: Bytes of tensors per slot; None takes the largest of `messages`.
            timeout_s: Seconds that one send or recv waits at most.
            spin_us: Microseconds that a wait polls before it sleeps.
            device: `jax.Device.local_hardware_id` of the one CPU device whose programs use this end; None for any.
        """
        require_wait(timeout_s, spin_us)
        room = slot_room(messages, num_slots=num_slots, slot_bytes=slot_bytes)
        handle = _custom_calls.ShmHandle.create(
            writer=role == "writer",
            peer=peer,
            num_slots=num_slots,
            slot_bytes=room,
            timeout_s=timeout_s,
            spin_us=spin_us,
            device=_custom_calls.ANY_DEVICE if device is None else device,
        )
        address = ChannelAddress(
            kind="shm", location=handle.path, num_slots=num_slots, slot_bytes=room, creator_role=role
        )
        return cls(handle, address, role=role, peer=peer, device=device)

    @classmethod
    def attach(
        cls,
        address: ChannelAddress,
        *,
        role: Role,
        peer: str,
        timeout_s: float = 60.0,
        spin_us: float = DEFAULT_SPIN_US,
    ) -> "ShmChannel":
        """Takes the free end of the ring at `address`; see `Channel.attach`."""
        require_kind(address, "shm")
        require_wait(timeout_s, spin_us)
        handle = _custom_calls.ShmHandle.attach(
            writer=role == "writer",
            peer=peer,
            path=address.location,
            num_slots=address.num_slots,
            slot_bytes=address.slot_bytes,
            timeout_s=timeout_s,
            spin_us=spin_us,
        )
        return cls(handle, address, role=role, peer=peer)

    @property
    def address(self) -> ChannelAddress:
        return self._address

    @property
    def id(self) -> int:
        return self._handle.id

    @property
    def targets(self) -> dict[Literal["send", "recv"], str]:
        return TARGETS

    @property
    def peer_pid(self) -> int | None:
        return self._handle.peer_pid or None

    @property
    def closed(self) -> bool:
        return self._handle.closed

    @property
    def failure(self) -> str | None:
        return self._handle.failure

    def abort(self) -> None:
        self._handle.abort()

    def close(self) -> None:
        self._handle.close()
