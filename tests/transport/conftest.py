"""Channels and the processes at their other ends."""

import dataclasses
from collections.abc import Callable, Iterator

import pytest
from channel_peer import ON_CPU, Peer, create, running_peer

from lamina_jax.transport import Channel, ChannelAddress, Role


@pytest.fixture(params=ON_CPU)
def kind(request: pytest.FixtureRequest) -> str:
    """A new kind of channel passes the same tests once it is listed. Ends of GPUs have theirs in tests/gpu."""
    return request.param


@pytest.fixture(scope="session")
def peer() -> Iterator[Peer]:
    """A process that lives through all tests. Tests that end or stop it take `mortal_peer`."""
    with running_peer("channel-test-peer") as process:
        yield process


@pytest.fixture
def mortal_peer() -> Iterator[Peer]:
    with running_peer("channel-test-mortal-peer") as process:
        yield process


@dataclasses.dataclass(frozen=True)
class Ends:
    """Our end, the number of the peer's, and the address that it got."""

    mine: Channel
    theirs: int
    address: ChannelAddress


@pytest.fixture
def connect(kind: str) -> Iterator[Callable[..., Ends]]:
    """Makes a channel whose other end `peer` holds; closed after the test."""
    made: list[Channel] = []

    def connect(peer: Peer, role: Role, **options) -> Ends:
        options = {"messages": [], "slot_bytes": 4096, "num_slots": 4, "timeout_s": 30.0} | options
        mine = create(kind, role=role, peer="the peer", **options)
        made.append(mine)
        return Ends(mine, peer.join_to(mine), mine.address)

    yield connect
    for channel in made:
        channel.close()
