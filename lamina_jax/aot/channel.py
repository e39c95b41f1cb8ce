"""Ends of CUDA channels that exist only for the compiler: they name custom calls, and nothing is at the other end."""

import itertools
from collections.abc import Sequence
from typing import Literal, NoReturn

from lamina_jax.transport import Channel, ChannelAddress, MessageSpec, Role
from lamina_jax.transport.base import largest_message

_ids = itertools.count(1)


class AotChannel(Channel):
    """A channel to compile with; anything that needs a peer raises RuntimeError."""

    def __init__(self, *, role: Role, peer: str, num_slots: int, slot_bytes: int):
        super().__init__(role=role, peer=peer, num_slots=num_slots, slot_bytes=slot_bytes)
        self._id = next(_ids)

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
    ) -> "AotChannel":
        del timeout_s
        return cls(role=role, peer=peer, num_slots=num_slots, slot_bytes=slot_bytes or largest_message(messages))

    @classmethod
    def attach(cls, address: ChannelAddress, *, role: Role, peer: str, timeout_s: float = 60.0) -> NoReturn:
        raise RuntimeError(f"a channel for compiling only has no other end; {peer} cannot attach to {address}")

    @property
    def address(self) -> NoReturn:
        raise RuntimeError("a channel for compiling only has no address; make one of a kind in channel_kinds()")

    @property
    def id(self) -> int:
        return self._id

    @property
    def targets(self) -> dict[Literal["send", "recv"], str]:
        return {"send": "lamina_cuda_send", "recv": "lamina_cuda_recv"}

    @property
    def peer_pid(self) -> None:
        return None

    @property
    def closed(self) -> bool:
        return False

    @property
    def failure(self) -> None:
        return None

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass
