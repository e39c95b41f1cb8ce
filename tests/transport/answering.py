"""A kind of channel, for tests only, whose creator needs an answer: shared memory with a challenge.

Each address carries a challenge of its own, and the answer to it is the challenge backwards: an answer that is missing,
or that of another channel, is noticed. Classes other than `AnsweringChannel` are workers that get it wrong.
"""

import secrets
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from lamina_jax.transport import Channel, ChannelAddress, MessageSpec, Role, ShmChannel, base

KIND = "answering"


def register(name: str = "AnsweringChannel") -> None:
    """Makes a class of this module the one of kind "answering" in this process."""
    base._KINDS[KIND] = f"answering:{name}"


class AnsweringChannel(Channel):
    """A ring in shared memory, not to be used before the creator has heard of the other end."""

    needs_answer = True

    def __init__(self, ring: ShmChannel, challenge: str, *, attached: bool):
        super().__init__(
            role=ring.role,
            peer=ring.peer,
            num_slots=ring.num_slots,
            slot_bytes=ring.slot_bytes,
            device=ring.device,
            attached=attached,
        )
        self._ring = ring
        self._challenge = challenge

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
        **options: Any,
    ) -> "AnsweringChannel":
        ring = ShmChannel.create(
            role=role,
            peer=peer,
            messages=messages,
            num_slots=num_slots,
            slot_bytes=slot_bytes,
            timeout_s=timeout_s,
            **options,
        )
        return cls(ring, secrets.token_hex(8), attached=False)

    @classmethod
    def attach(
        cls, address: ChannelAddress, *, role: Role, peer: str, timeout_s: float = 60.0, **options: Any
    ) -> "AnsweringChannel":
        path, challenge = address.location.split(" ")
        at = msgspec.structs.replace(address, kind="shm", location=path)
        ring = ShmChannel.attach(at, role=role, peer=peer, timeout_s=timeout_s, **options)
        return cls(ring, challenge, attached=True)

    @property
    def address(self) -> ChannelAddress:
        at = self._ring.address
        return msgspec.structs.replace(at, kind=KIND, location=f"{at.location} {self._challenge}")

    @property
    def answer(self) -> ChannelAddress | None:
        created = self._ring.address.creator_role == self.role
        return None if created else msgspec.structs.replace(self.address, location=self._challenge[::-1])

    def _connect(self, answer: ChannelAddress) -> None:
        if answer.location != self._challenge[::-1]:
            raise ValueError(f"{self.peer} answered {answer.location!r} to the challenge {self._challenge!r}")

    @property
    def id(self) -> int:
        return self._ring.id

    @property
    def targets(self) -> dict[Literal["send", "recv"], str]:
        return self._ring.targets

    @property
    def peer_pid(self) -> int | None:
        return self._ring.peer_pid

    @property
    def closed(self) -> bool:
        return self._ring.closed

    @property
    def failure(self) -> str | None:
        return self._ring.failure

    def abort(self) -> None:
        self._ring.abort()

    def close(self) -> None:
        self._ring.close()


class Silent(AnsweringChannel):
    """Has nothing to say."""

    @property
    def answer(self) -> None:
        return None


class OfAnotherKind(AnsweringChannel):
    """Speaks of shared memory."""

    @property
    def answer(self) -> ChannelAddress:
        return self._ring.address


class Confused(AnsweringChannel):
    """Answers every challenge with that of the channel attached to before."""

    _last = "nothing"

    def __init__(self, ring: ShmChannel, challenge: str, *, attached: bool):
        super().__init__(ring, challenge, attached=attached)
        self._answer = Confused._last
        Confused._last = challenge[::-1]

    @property
    def answer(self) -> ChannelAddress:
        return msgspec.structs.replace(self.address, location=self._answer)
