"""The control connection between hosts: sessions, ends that die or hang, and everything that is not a session."""

import contextlib
import dataclasses
import random
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from control_ends import HERE, LOOPBACK, Raw, ignore, linked, process, received, wait_until
from control_peer import NAME, Ping, Pong

from lamina_jax.runtime import control_tcp
from lamina_jax.runtime import control_wire as wire
from lamina_jax.runtime.cluster_key import ClusterKey, load_key_file, make_key_file
from lamina_jax.runtime.control_tcp import (
    ControlLink,
    ControlListener,
    Session,
    SessionEnded,
    same_host,
)
from lamina_jax.runtime.errors import WorkerError


class Told(Exception):  # noqa: N818 - what a test waits for
    """The engine was told what it waits for."""


@pytest.fixture(autouse=True)
def talkative(monkeypatch) -> None:
    """Engines are told soon what they wait for."""
    monkeypatch.setattr(control_tcp, "_TELL_S", 0.05)


def wait_to_hear(link: ControlLink, text: str) -> None:
    """Opens a link until it says that it waits for something."""

    def listen(told: str) -> None:
        if text in told:
            raise Told

    with pytest.raises(Told):
        link.open(60.0, listen)


@contextlib.contextmanager
def listening(key: ClusterKey | None, address: str = LOOPBACK) -> Iterator[ControlListener]:
    listener = ControlListener(address, key, Ping, NAME, HERE)
    try:
        yield listener
    finally:
        listener.close()


@pytest.fixture
def listener(key) -> Iterator[ControlListener]:
    with listening(key) as listener:
        yield listener


def accepted(listener: ControlListener) -> Session:
    session = listener.accept(timeout_ms=20_000)
    assert session is not None
    return session


def ended(end: Session | ControlLink) -> str:
    """Why a session is over, which it soon is."""
    try:
        while True:
            received(end)
    except (SessionEnded, WorkerError) as error:
        return str(error)


def converse(listener: ControlListener, key: ClusterKey | None) -> None:
    """A session, from its opening to its end."""
    with linked(listener.address, key) as link:
        link.open(30.0, ignore)
        session = accepted(listener)
        link.send(Ping(7))
        assert received(session) == Ping(7)
        session.send(Pong(7))
        assert received(link) == Pong(7)
    assert "the engine ended it" in ended(session)
    session.close("over")


# Sessions


def test_a_session_carries_messages_both_ways_in_order(listener, key):
    with linked(listener.address, key) as link:
        assert link.open(30.0, ignore) == HERE
        session = accepted(listener)
        assert session.peer == HERE
        for number in range(200):
            link.send(Ping(number))
            session.send(Pong(number))
        assert [received(session).number for _ in range(200)] == list(range(200))
        assert [received(link).number for _ in range(200)] == list(range(200))
        assert session.receive(timeout_ms=0) is None
        assert link.receive(timeout_ms=0) is None
        link.check()
    assert listener.counters.opened == 1


@pytest.mark.parametrize("size", [wire.FRAME_BYTES - 100, wire.FRAME_BYTES, 5 * wire.FRAME_BYTES + 1, 40 << 20])
def test_large_messages(listener, key, size):
    data = random.Random(size).randbytes(size)
    with linked(listener.address, key) as link:
        link.open(30.0, ignore)
        session = accepted(listener)
        link.send(Ping(1, data))
        assert received(session).data == data


def test_a_message_that_is_too_large_is_not_sent(listener, key):
    with linked(listener.address, key) as link:
        link.open(30.0, ignore)
        session = accepted(listener)
        for end in (link, session):
            with pytest.raises(ValueError, match=r"Ping takes \d+ bytes, and a control message at most 67108864"):
                end.send(Ping(1, bytes(wire.MAX_MESSAGE_BYTES)))
        link.send(Ping(2))
        assert received(session).number == 2


def test_one_descriptor_for_each_link_tells_what_has_come(key):
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(listening(key)) for _ in range(2)]
        links = [stack.enter_context(linked(each.address, key)) for each in listeners]
        for link in links:
            link.open(30.0, ignore)
        sessions = [accepted(each) for each in listeners]
        poller = zmq.Poller()
        for link in links:
            poller.register(link.fileno(), zmq.POLLIN)
        assert poller.poll(0) == []
        sessions[1].send(Pong(1))
        assert [fd for fd, _ in poller.poll(20_000)] == [links[1].fileno()]
        assert received(links[1]) == Pong(1)
        assert poller.poll(0) == []
        sessions[0].close("enough")
        assert [fd for fd, _ in poller.poll(20_000)] == [links[0].fileno()]


def test_loopback_needs_no_key():
    for host in ("127.0.0.1", "127.1.2.3", "localhost"):
        with listening(None, f"tcp://{host}:0") as listener:
            converse(listener, None)


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="no IPv6")
def test_ipv6(key):
    for each in (None, key):
        with listening(each, "tcp://[::1]:0") as listener:
            assert listener.address.startswith("tcp://[::1]:")
            converse(listener, each)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.2", "[::]", "worker-1.example", "127.example"])
def test_other_addresses_need_a_key(host, key):
    for end in (ControlListener, ControlLink):
        with pytest.raises(ValueError, match=r"not a loopback address.*make_cluster_key\.py"):
            end(f"tcp://{host}:7501", None, Ping, NAME, HERE)
    with listening(key, "tcp://0.0.0.0:0") as listener, linked(listener.address, key) as link:
        link.open(30.0, ignore)


@pytest.mark.parametrize(
    "address", ["", "7501", "10.0.0.2:7501", "tcp://10.0.0.2", "tcp://h:x", "tcp://h:65536", "ipc://a"]
)
def test_other_addresses_are_none(address, key):
    for end in (ControlListener, ControlLink):
        with pytest.raises(ValueError, match="expected an address like tcp://"):
            end(address, key, Ping, NAME, HERE)


def test_an_address_that_is_taken(listener, key):
    with pytest.raises(OSError, match=f"{NAME} cannot listen on {listener.address}"):
        ControlListener(listener.address, key, Ping, NAME, HERE)
    with pytest.raises(OSError, match=r"cannot listen on tcp://192\.0\.2\.1:0"):
        ControlListener("tcp://192.0.2.1:0", key, Ping, NAME, HERE)


def test_same_host():
    change = msgspec.structs.replace
    assert same_host(HERE, change(HERE, pid=1, rdma="mlx5_0"))
    for field, value in {"boot_id": "another", "pid_namespace": "pid:[1]", "uid": HERE.uid + 1}.items():
        assert not same_host(HERE, change(HERE, **{field: value}))


# Ends that come late, leave, die and hang


def test_the_engine_waits_for_a_worker_that_starts_late(key):
    with listening(key) as gone:
        address = gone.address
    told: list[str] = []
    with linked(address, key) as link, contextlib.ExitStack() as stack:

        def start(text: str) -> None:
            told.append(text)
            if len(told) == 2:
                stack.enter_context(listening(key, address))

        assert link.open(60.0, start) == HERE
        assert told[0] == f"{NAME} at {address}: no answer yet"


def test_the_engine_does_not_wait_for_ever(key):
    with listening(key) as gone:
        address = gone.address
    with (
        linked(address, key) as link,
        pytest.raises(WorkerError, match=rf"Waited 1 s for {NAME} at {address}: no answer"),
    ):
        link.open(1.0, ignore)


def test_a_worker_serves_one_engine_after_another(listener, key):
    for _ in range(3):
        converse(listener, key)
    wait_until(lambda: listener.counters.left == 3, "three that left")
    assert dataclasses.asdict(listener.counters) == {
        **dict.fromkeys(dataclasses.asdict(listener.counters), 0),
        "connections": 3,
        "opened": 3,
        "left": 3,
    }


def test_the_worker_says_why_it_ends_a_session(listener, key):
    with linked(listener.address, key) as link:
        link.open(30.0, ignore)
        session = accepted(listener)
        session.send(Pong(1))
        session.close("the device is on fire")
        assert received(link) == Pong(1)
        why = ended(link)
        assert why == f"{NAME} at {listener.address}, on {HERE}: the device is on fire."
        for use in (link.check, lambda: link.send(Ping(1))):
            with pytest.raises(WorkerError, match="the device is on fire"):
                use()
    converse(listener, key)


def test_what_came_before_the_end_is_received(listener, key):
    with linked(listener.address, key) as link:
        link.open(30.0, ignore)
        session = accepted(listener)
        for number in range(100):
            link.send(Ping(number))
    assert [received(session).number for _ in range(100)] == list(range(100))
    assert "the engine ended it" in ended(session)
    with pytest.raises(SessionEnded, match="the engine ended it"):
        session.send(Pong(1))


def test_ends_that_close_at_once_still_say_why(key):
    for _ in range(10):
        with listening(key) as listener, linked(listener.address, key) as link:
            link.open(30.0, ignore)
            listener.close("it was told to end")
            assert "it was told to end" in ended(link)
        with listening(key) as listener, linked(listener.address, key) as link:
            link.open(30.0, ignore)
            session = accepted(listener)
            link.close("it has had enough")
            assert "it has had enough" in ended(session)


def test_other_engines_are_told_who_is_served(listener, key):
    first_info = msgspec.structs.replace(HERE, host="first", pid=4711)
    with linked(listener.address, key, first_info) as first, linked(listener.address, key) as second:
        first.open(30.0, ignore)
        session = accepted(listener)
        told: list[str] = []

        def leave(text: str) -> None:
            told.append(text)
            if "busy with the engine on first (pid 4711)" in text:
                first.close()
                assert "the engine ended it" in ended(session)
                session.close("over")

        second.open(60.0, leave)
        assert listener.counters.refused_busy >= 1
        assert listener.counters.opened == 2


def test_an_engine_is_busy_until_the_worker_has_closed_its_session(listener, key):
    with linked(listener.address, key) as first:
        first.open(30.0, ignore)
        session = accepted(listener)
    assert "the engine ended it" in ended(session)
    with linked(listener.address, key) as second:
        wait_to_hear(second, f"{NAME} at {listener.address}: refused: busy with the engine on {HERE}")
    session.close("over")
    converse(listener, key)


def test_a_session_that_is_over_before_it_is_accepted_is_not(listener, key):
    with linked(listener.address, key) as link:
        link.open(30.0, ignore)
    wait_until(lambda: listener.counters.left == 1, "the engine to leave")
    assert listener.accept(timeout_ms=100) is None
    converse(listener, key)


def test_an_engine_that_is_killed_makes_room_at_once(listener, key, key_file):
    with process("engine", listener.address, key_file) as (child, line):
        assert line() == "open"
        session = accepted(listener)
        child.kill()
        assert f"(pid {child.pid}) is over: the connection is lost" in ended(session)
        session.close("over")
        converse(listener, key)
        wait_until(lambda: listener.counters.cut_off == 1, "the lost connection to be counted")


def test_an_engine_that_hangs_is_told_so_when_it_wakes(listener, key, key_file):
    with process("engine", listener.address, key_file) as (child, line):
        assert line() == "open"
        session = accepted(listener)
        child.send_signal(signal.SIGSTOP)
        assert "no sign of life for 5 s" in ended(session)
        session.close("over")
        converse(listener, key)
        child.send_signal(signal.SIGCONT)
        assert f"{NAME} at {listener.address}, on {HERE}: " in line()


def test_a_worker_that_is_killed_or_hangs(key, key_file):
    with process("worker", LOOPBACK, key_file) as (child, line):
        address = line()
        with linked(address, key) as link:
            peer = link.open(30.0, ignore)
            assert peer.pid == child.pid
            child.send_signal(signal.SIGSTOP)
            assert f"{NAME} at {address}, on {peer}: no sign of life for 5 s" in ended(link)
        child.send_signal(signal.SIGCONT)
        with linked(address, key) as link:
            link.open(30.0, ignore)
            child.kill()
            assert f"{NAME} at {address}, on {peer}: the connection is lost" in ended(link)
    with process("worker", address, key_file) as (child, line), linked(address, key) as link:
        assert link.open(60.0, ignore).pid == child.pid
        link.send(Ping(3))
        assert received(link).number == 3


def test_an_end_that_does_not_read_does_not_fill_the_memory(listener, key):
    with linked(listener.address, key) as link:
        link.open(30.0, ignore)
        session = accepted(listener)
        for number in range(257):
            # ZeroMQ itself takes no more than 256 at a time.
            if number in (100, 200):
                wait_until(lambda sent=number: len(session._conversation.inbox) == sent, "the messages to come")
            link.send(Ping(number))
        assert "256 messages wait unread" in ended(link)
        assert [received(session).number for _ in range(256)] == list(range(256))
        assert "256 messages wait unread" in ended(session)
        session.close("over")
    converse(listener, key)


def test_a_message_that_makes_no_sense_ends_the_session_and_is_counted(listener, key):
    with linked(listener.address, key) as link:
        link.open(30.0, ignore)
        session = accepted(listener)
        link.send(Ping(-1))
        assert received(session) == Ping(-1)
        session.refuse("-1 is not the number of a ping")
        assert "-1 is not the number of a ping" in ended(link)
    assert listener.counters.malformed == 1
    converse(listener, key)


@pytest.mark.parametrize(
    ("field", "value"), [("version", "0.0.9"), ("jax", "0.1"), ("protocol", 99), ("byte_order", "big")]
)
def test_ends_that_do_not_agree_are_refused_at_once(listener, key, field, value):
    other = msgspec.structs.replace(HERE, host="elsewhere", pid=1, **{field: value})
    with linked(listener.address, key, other) as link, pytest.raises(WorkerError) as caught:
        link.open(600.0, ignore)
    text = str(caught.value)
    for part in (NAME, listener.address, "elsewhere (pid 1)", str(HERE), str(value), str(getattr(HERE, field))):
        assert part in text
    assert listener.counters.refused_mismatch == 1
    converse(listener, key)


# Who has no business here


@pytest.mark.parametrize("case", ["another key", "no key", "a key where the worker has none"])
def test_without_the_key_there_is_no_session(case, key, caplog):
    other = ClusterKey(*zmq.curve_keypair())
    theirs, ours = {
        "another key": (key, other),
        "no key": (key, None),
        "a key where the worker has none": (None, key),
    }[case]
    with listening(theirs) as listener:
        with linked(listener.address, ours) as link:
            wait_to_hear(link, f"{NAME} at {listener.address}: handshake refused: is it the same cluster key?")
        wait_until(lambda: listener.counters.handshakes_failed >= 1, "the failed handshake to be counted")
        assert listener.counters.opened == 0
        assert any(f"{NAME}: handshakes failed " in text for text in caplog.messages)
        converse(listener, theirs)


def test_a_stale_key(key_file):
    stale = load_key_file(key_file)
    key_file.unlink()
    with listening(make_key_file(key_file)) as renewed:
        with linked(renewed.address, stale) as link:
            wait_to_hear(link, "handshake refused: is it the same cluster key?")
        wait_until(lambda: renewed.counters.handshakes_failed >= 1, "the failed handshake to be counted")
        converse(renewed, load_key_file(key_file))


def test_knowing_the_public_key_is_not_enough(listener, key):
    with Raw(listener.address, key, own=zmq.curve_keypair()) as raw:
        raw.say(bytes(16), 0, wire.Open(HERE))
        wait_until(lambda: listener.counters.handshakes_failed == 1, "the failed handshake")
        assert raw.hears_nothing()
    assert listener.counters.opened == 0


def test_a_link_goes_on_after_something_else_answered_at_the_address(key):
    """As when the port was another program's before the worker started."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        address = f"tcp://127.0.0.1:{port}"
        with linked(address, key) as link, contextlib.ExitStack() as stack:
            opening = threading.Thread(target=lambda: link.open(60.0, ignore))
            opening.start()
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10)
            server.close()
            listener = stack.enter_context(listening(key, address))
            opening.join(60)
            link.check()
            accepted(listener)


def test_what_was_recorded_says_nothing_again(listener, key):
    with Raw(listener.address, key) as first:
        number = first.open()
        recorded = [first.say(number, i, Ping(i)) for i in range(3)]
        session = accepted(listener)
        assert [received(session).number for _ in range(3)] == [0, 1, 2]
        # Again in the same session, and from another connection.
        for frames in recorded:
            first.socket.send_multipart(frames)
        with Raw(listener.address, key) as thief:
            for frames in recorded:
                thief.socket.send_multipart(frames)
            thief.say(number, 3, Ping(3))
            wait_until(lambda: listener.counters.replayed == 7, "seven replayed messages")
            assert thief.hears_nothing()
        # A number that was skipped is as wrong as one that was there.
        first.say(number, 4, Ping(4))
        first.say(number, 3, Ping(33))
        assert received(session) == Ping(33)
        assert listener.counters.replayed == 8
        first.say(number, 4, wire.Close("done"))
        assert "done" in ended(session)
        session.close("over")
    # Everything again, from the opening on: the new session has another number.
    with Raw(listener.address, key) as later:
        assert later.open() != number
        for frames in recorded:
            later.socket.send_multipart(frames)
        wait_until(lambda: listener.counters.unknown_session == 3, "three messages of the old session")
    assert listener.accept(timeout_ms=0) is None
    converse(listener, key)


def test_oversize(listener, key, caplog):
    with Raw(listener.address, key) as raw:
        header = msgspec.msgpack.encode([bytes(16), 0])
        raw.socket.send_multipart([header, bytes(wire.FRAME_BYTES + 1)])
        raw.socket.send_multipart([header, *[bytes(wire.FRAME_BYTES)] * 258])
        wait_until(lambda: listener.counters.oversize == 2, "two oversize messages")
        raw.socket.send(bytes(3 * wire.FRAME_BYTES))
        wait_until(lambda: listener.counters.cut_off >= 1, "ZeroMQ to hang up")
        assert raw.hears_nothing()
    assert [text for text in caplog.messages if f"{NAME}: oversize " in text and text.endswith("(1 so far)")]
    converse(listener, key)


@pytest.mark.parametrize("theirs", [True, False])
def test_what_fails_inside_does_not_hang_the_other_end(listener, key, monkeypatch, theirs):
    def fail(_: object) -> None:
        raise RuntimeError("a bug")

    with linked(listener.address, key) as link:
        link.open(30.0, ignore)
        session = accepted(listener)
        monkeypatch.setattr(listener if theirs else link, "_receive", fail)
        if theirs:
            assert "its control thread failed: RuntimeError('a bug')" in ended(link)
            with pytest.raises(RuntimeError, match=f"{NAME} does not listen any more: .*a bug"):
                listener.accept(timeout_ms=20_000)
        else:
            assert "its control thread failed: RuntimeError('a bug')" in ended(link)
            assert "the connection is lost" in ended(session)
