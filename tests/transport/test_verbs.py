"""What only channels over RDMA promise. Needs an RDMA device: `make rdma-test` runs this in a virtual machine."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from channel_peer import Mail, Peer, create, recv_all, running_peer, send_all

from lamina_jax import _custom_calls
from lamina_jax.testing.rdma.faults import SmallCompletionQueue, fail_queue_pair
from lamina_jax.transport import Channel, ChannelAddress, Role, attach, verbs

FAILS = jax.errors.JaxRuntimeError
# More of them with LAMINA_KILL_SEEDS=10.
KILL_SEEDS = range(int(os.environ.get("LAMINA_KILL_SEEDS", "1")))
ROLES: tuple[Role, ...] = ("writer", "reader")
SMALL: dict[str, Any] = {"slot_bytes": 4096, "num_slots": 4, "timeout_s": 30.0}
DEATH = "the peer does not answer any more: its process or host has died, or the link is down"

needs_device = pytest.mark.skipif(verbs.rdma_problem() is not None, reason=str(verbs.rdma_problem()))


@pytest.fixture
def join() -> Iterator[Callable[..., tuple[verbs.VerbsChannel, verbs.VerbsChannel]]]:
    """Makes a channel, both of whose ends are here: (writer, reader)."""
    made: list[Channel] = []

    def join(**options) -> tuple[verbs.VerbsChannel, verbs.VerbsChannel]:
        options = SMALL | options
        writer = verbs.VerbsChannel.create(role="writer", peer="the reader", messages=[], **options)
        made.append(writer)
        reader = attach(writer.address, role="reader", peer="the writer", timeout_s=options["timeout_s"])
        made.append(reader)
        writer.connect(reader.answer)
        assert isinstance(reader, verbs.VerbsChannel)
        return writer, reader

    yield join
    for channel in made:
        channel.close()


def move(channel: Channel, count: int = 1, num_bytes: int = 64) -> None:
    """Sends, or receives, messages of so many bytes, without XLA. Raises RuntimeError."""
    _custom_calls.stream(channel.id, num_bytes, count, copies=True)


def resources() -> list[int]:
    """Queue pairs, completion queues and memory regions that the kernel holds, of all processes together."""
    run = subprocess.run(["rdma", "resource", "show"], capture_output=True, text=True, timeout=60, check=True)
    return [sum(map(int, re.findall(rf"\b{kind} (\d+)", run.stdout))) for kind in ("qp", "cq", "mr")]


def device_of(channel: verbs.VerbsChannel) -> str:
    return re.escape(channel._end._device.name)


@needs_device
@pytest.mark.parametrize("num_floats", [0, 1, 32, 48, 49, 1024])
def test_inline_or_not_all_bytes_arrive(join, num_floats):
    writer, reader = join(num_slots=2)
    mails = [Mail(shapes=((num_floats,),), layer=layer, seed=layer) for layer in range(5)]
    for mail in mails:
        send_all([writer], [mail])
        ((got,),) = recv_all([reader], [mail])
        np.testing.assert_array_equal(got, mail.contents()[0])


@needs_device
def test_queue_pair_that_fails_is_an_error_at_both_ends(join):
    writer, reader = join()
    move(writer)
    move(reader)
    fail_queue_pair(reader._end)
    start = time.monotonic()
    with pytest.raises(
        RuntimeError, match=rf"recv .* from the writer .*the queue pair has failed .*{device_of(reader)}"
    ):
        move(reader)
    with pytest.raises(RuntimeError, match=rf"send .* to the reader .*({DEATH}|has aborted)"):
        move(writer, 100)
    assert time.monotonic() - start < 30  # the timeout of one wait


@needs_device
def test_peer_that_has_gone_before_the_first_message(join):
    """Half open: the creator learns of the other end, which is not there any more."""
    writer = verbs.VerbsChannel.create(role="writer", peer="the reader", messages=[], num_slots=2, timeout_s=30.0)
    reader = attach(writer.address, role="reader", peer="the writer")
    answer = reader.answer
    reader.close()
    with writer:
        writer.connect(answer)
        with pytest.raises(
            RuntimeError, match=rf"to the reader \(pid {os.getpid()}\) failed: {DEATH}.*{device_of(writer)}"
        ):
            move(writer, 3)


@needs_device
def test_completion_queue_that_overruns_is_an_error(join, monkeypatch):
    monkeypatch.setattr(verbs, "CompletionQueue", SmallCompletionQueue)
    writer, reader = join(num_slots=8)
    # Smaller ones may come without a completion.
    move(writer, 8, 1024)
    with pytest.raises(RuntimeError, match=rf"failed: the device reports: .*CQ.*{device_of(reader)}"):
        move(reader, 9, 1024)


@needs_device
def test_memory_that_may_not_be_locked_is_refused():
    """As a user whose `ulimit -l` is 64 KB."""
    program = """
import os, resource
from lamina_jax.transport import verbs
verbs.rdma_device()
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
os.setresuid(65534, 65534, 65534)
try:
    verbs.VerbsChannel.create(role="writer", peer="the peer", messages=[], slot_bytes=1 << 20, num_slots=8)
except OSError as error:
    print(error)
os._exit(0)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    where = rf"{verbs.rdma_device()} on \S+, channel to the peer"
    assert re.search(rf"{where}: the NIC cannot register \d+ bytes of memory: .*`ulimit -l`", run.stdout), run


@needs_device
def test_closing_gives_everything_back(join):
    before = resources()
    for _ in range(3):
        writer, reader = join()
        move(writer)
        move(reader)
        assert resources() > before
        writer.close()
        reader.close()
    assert resources() == before


class Doomed:
    """A peer that is killed `after_s` seconds into an order."""

    def __init__(self, peer: Peer, order: str, after_s: float):
        self._peer = peer
        self._order = order
        self._after_s = after_s

    def start(self, order: str, *arguments: object) -> None:
        """Gives an order, and kills if it is the one."""
        with contextlib.suppress(OSError):  # it is dead already
            self._peer.start(order, *arguments)
        if order == self._order:
            threading.Timer(self._after_s, self._peer.signal, [signal.SIGKILL]).start()

    def do(self, order: str, *arguments: object):
        """The answer to an order; None of a dead peer."""
        self.start(order, *arguments)
        try:
            return self._peer.result()
        except (OSError, EOFError):
            return None

    def join(self, role: Role, *, creates: bool) -> Channel | None:
        """Our end of a channel to it; None if it dies before there is one."""
        theirs = "reader" if role == "writer" else "writer"
        if creates:
            address = self.do("create", 0, "verbs", theirs, SMALL)
            channel = address and attach(address, role=role, peer="the peer", timeout_s=SMALL["timeout_s"])
            if channel:
                self.do("connect", 0, channel.answer)
            return channel
        channel = create("verbs", role=role, peer="the peer", messages=[], **SMALL)
        self.do("attach", 0, channel.address, theirs, {})
        if answer := self.do("answer", 0):
            channel.connect(answer)
        return channel


@needs_device
@pytest.mark.parametrize("seed", KILL_SEEDS)
@pytest.mark.parametrize("order", ["create", "connect", "attach", "answer", "stream"])
def test_peer_killed_in_any_order_leaves_nothing(order, seed):
    """While it makes, takes or connects its end, or moves messages: no wait of ours lasts, and nothing is left."""
    rng, before = random.Random(f"{order} {seed}"), resources()
    creates = order in ("create", "connect") or (order == "stream" and rng.random() < 0.5)
    role = rng.choice(ROLES)
    with running_peer("doomed") as peer:
        peer.do("run", ["true"])  # it is up
        doomed = Doomed(peer, order, rng.random() * 0.3)
        channel = doomed.join(role, creates=creates)
        if channel is not None and channel.connected:
            doomed.start("stream", 0, 1 << 30)
            start = time.monotonic()
            with pytest.raises(RuntimeError, match=rf"the peer .*{DEATH}.*\(.* of rxe"):
                move(channel, 1 << 30)
            assert time.monotonic() - start < SMALL["timeout_s"]
        if channel is not None:
            channel.close()
        peer.join()
    deadline = time.monotonic() + 30
    while (left := resources()) != before:
        assert time.monotonic() < deadline, (left, before)


@needs_device
def test_unknown_device_is_refused():
    with pytest.raises(
        OSError, match=r"verbs channels need the RDMA device mlx9 with an active port .*; RDMA devices: rxe"
    ):
        verbs.VerbsChannel.create(role="writer", peer="the peer", messages=[], nic="mlx9")


@pytest.mark.skipif(verbs.rdma_problem() is None, reason="there is all that verbs needs")
def test_what_is_missing_is_said():
    with pytest.raises(OSError, match=r"verbs channels need (an RDMA device|pyverbs|the custom calls of RDMA)"):
        verbs.VerbsChannel.create(role="writer", peer="the peer", messages=[])


def test_without_pyverbs_it_is_said_what_to_install(monkeypatch):
    for name in ("pyverbs", "pyverbs.device"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(OSError, match=r"verbs channels need pyverbs, .*`make rdma`, or install lamina_jax\[rdma\]"):
        verbs._pyverbs("device")


def test_large_slots_are_refused():
    with pytest.raises(ValueError, match="slot_bytes must be below 2 GB"):
        verbs.VerbsChannel.create(role="writer", peer="the peer", messages=[], slot_bytes=1 << 31)


def test_senseless_address_is_refused():
    address = ChannelAddress(kind="verbs", location="?", num_slots=1, slot_bytes=64, creator_role="writer")
    with pytest.raises(ValueError, match="expected how to reach the writer's end of a verbs channel, got '\\?'"):
        attach(address, role="reader", peer="the writer")
