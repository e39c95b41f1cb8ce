"""A kind of channel, for tests only, whose creator needs an answer: shared memory with a challenge.

Each address carries a challenge of its own, and the answer to it is the challenge backwards: an answer that is missing,
or that of another channel, is noticed. Classes other than `AnsweringChannel` are workers that get it wrong.
"""

import secrets
from typing import Any, cast

import msgspec

from lamina_jax.transport import ChannelAddress, ShmChannel, base

KIND = "answering"


def register(name: str = "AnsweringChannel") -> None:
    """Makes a class of this module the one of kind "answering" in this process."""
    base._KINDS[KIND] = f"answering:{name}"


class AnsweringChannel(ShmChannel):
    """A ring in shared memory, not to be used before the creator has heard of the other end."""

    needs_answer = True
    _challenge: str

    @classmethod
    def create(cls, **options: Any) -> "AnsweringChannel":
        channel = cast(AnsweringChannel, super().create(**options))
        channel._challenge = secrets.token_hex(8)
        return channel

    @classmethod
    def attach(cls, address: ChannelAddress, **options: Any) -> "AnsweringChannel":
        path, challenge = address.location.split(" ")
        ring = msgspec.structs.replace(address, kind="shm", location=path)
        channel = cast(AnsweringChannel, super().attach(ring, **options))
        channel._challenge = challenge
        channel._connected = True
        return channel

    @property
    def address(self) -> ChannelAddress:
        return msgspec.structs.replace(self._address, kind=KIND, location=f"{self._address.location} {self._challenge}")

    @property
    def answer(self) -> ChannelAddress | None:
        created = self._address.creator_role == self.role
        return None if created else msgspec.structs.replace(self.address, location=self._challenge[::-1])

    def _connect(self, answer: ChannelAddress) -> None:
        if answer.location != self._challenge[::-1]:
            raise ValueError(f"{self.peer} answered {answer.location!r} to the challenge {self._challenge!r}")


class Silent(AnsweringChannel):
    """Has nothing to say."""

    @property
    def answer(self) -> None:
        return None


class OfAnotherKind(AnsweringChannel):
    """Speaks of shared memory."""

    @property
    def answer(self) -> ChannelAddress:
        return self._address


class Confused(AnsweringChannel):
    """Answers the challenge of the channel attached to before."""

    _last = "nothing"

    @property
    def answer(self) -> ChannelAddress:
        answer = msgspec.structs.replace(self.address, location=Confused._last)
        Confused._last = self._challenge[::-1]
        return answer
