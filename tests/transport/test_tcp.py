"""What only channels over TCP promise, tried with a fake peer on a plain socket."""

import contextlib
import os
import pathlib
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import msgspec
import numpy as np
import pytest
from channel_peer import LIMIT_S, Mail, create, recv_all, send_all

from lamina_jax.transport import Channel, ChannelAddress, Role, Tag, attach, tcp

FAILS = jax.errors.JaxRuntimeError
HERE = pathlib.Path(__file__).parent

# The protocol as custom_calls/tcp_frame.h and message.h describe it, written down once more.
HELLO, WELCOME, FRAME = b"LMATCP01", b"WELCME01", 0x464D414C
MESSAGE, CREDIT, CLOSED, ABORTED = 1, 2, 3, 4


def frame(kind: int, count: int, *, magic: int = FRAME, message: bytes = bytes(40)) -> bytes:
    return struct.pack("<IIQ", magic, kind, count) + message


def message(mail: Mail, count: int, *, payload_bytes: int | None = None) -> bytes:
    """A message frame with its payload."""
    payload, layout = b"", 0
    for tensor in mail.contents():
        data = tensor.tobytes()
        # XLA's numbers of the dtypes that the tests below use
        dtype = {"float32": 11, "int32": 4}[tensor.dtype.name]
        layout = (layout ^ (len(data) << 8 | dtype)) * 0x9E3779B97F4A7C15 % 2**64
        payload += data + bytes(-len(data) % 64)
    stated = len(payload) if payload_bytes is None else payload_bytes
    stamp = (int(mail.tag), mail.step, mail.layer, mail.batch)
    described = struct.pack("<QQiiiiII", stated, layout, *stamp, len(mail.shapes), 0)
    return frame(MESSAGE, count, message=described) + payload


def port(answer: ChannelAddress | None) -> tuple[str, int]:
    assert answer is not None
    where = msgspec.json.decode(answer.location)
    return where["host"], where["port"]


def token(address: ChannelAddress) -> bytes:
    return msgspec.json.decode(address.location, type=tcp._Creator).token


class Line:
    """The connection of a fake peer to an end under test."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(LIMIT_S)
        self.socket = connection

    def say(self, data: bytes) -> None:
        self.socket.sendall(data)

    def hear(self, num_bytes: int) -> bytes:
        """What comes next; less than that many bytes at the end of what there is."""
        heard = b""
        while len(heard) < num_bytes and (more := self.socket.recv(num_bytes - len(heard))):
            heard += more
        return heard

    def heard_the_end(self) -> bool:
        """Whether the end under test has nothing more to say."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True


@pytest.fixture
def close_later():
    made = []
    yield made.append
    for thing in made:
        thing.close()


@pytest.fixture
def faked(close_later):
    """An end under test and the line of the fake peer at the other: `faked("reader")` is told by a fake writer."""

    def make(role: Role, **options) -> tuple[Channel, Line]:
        theirs = "writer" if role == "reader" else "reader"
        options = {"num_slots": 2, "slot_bytes": 4096, "timeout_s": 30.0} | options
        address = create("tcp", role=theirs, peer="", messages=[], **options).address
        channel = attach(address, role=role, peer="the peer", timeout_s=options["timeout_s"])
        close_later(channel)
        line = Line(socket.create_connection(port(channel.answer)))
        close_later(line.socket)
        line.say(HELLO + token(address))
        assert line.hear(8) == WELCOME
        return channel, line

    return make


@pytest.fixture
def background():
    with ThreadPoolExecutor(1) as pool:
        yield pool


def mails(count: int, *, words: int = 4) -> list[Mail]:
    return [Mail(shapes=((words,),), layer=layer, seed=layer) for layer in range(count)]


def assert_arrived(channel: Channel, expected: list[Mail]) -> None:
    for got, mail in zip(recv_all([channel], expected), expected, strict=True):
        np.testing.assert_array_equal(got[0], mail.contents()[0])


TWO_TENSORS = Mail(shapes=((3,), (5, 5)), dtypes=("float32", "int32"), tag=Tag.KV, step=7, layer=2, seed=3)


def test_what_a_writer_says(faked):
    writer, line = faked("writer")
    send_all([writer], [TWO_TENSORS])
    expected = message(TWO_TENSORS, 0)
    got = line.hear(len(expected))
    # What pads a tensor to 64 bytes is not part of it.
    header, first, second = slice(0, 56), slice(56, 56 + 12), slice(120, 120 + 100)
    assert [got[part] for part in (header, first, second)] == [expected[part] for part in (header, first, second)]
    writer.close()
    assert line.hear(56) == frame(CLOSED, 1)
    assert line.heard_the_end()


def test_what_a_reader_says(faked):
    reader, line = faked("reader", num_slots=4)
    line.say(b"".join(message(mail, i) for i, mail in enumerate(mails(4))))
    assert_arrived(reader, mails(4))
    assert line.hear(56) + line.hear(56) == frame(CREDIT, 2) + frame(CREDIT, 4)
    reader.abort()
    assert line.hear(56) == frame(ABORTED, 4)
    assert line.heard_the_end()


@pytest.mark.parametrize("piece", [1, 55, 57, 119, 1000])
def test_stream_in_pieces(faked, piece):
    """TCP keeps no bounds of messages."""
    reader, line = faked("reader", num_slots=8)
    stream = b"".join(message(mail, i) for i, mail in enumerate(mails(3)))
    stream += message(Mail(shapes=(), dtypes=(), layer=3), 3) + frame(CLOSED, 4)
    for begin in range(0, len(stream), piece):
        line.say(stream[begin : begin + piece])
    assert_arrived(reader, mails(3))
    recv_all([reader], [Mail(shapes=(), dtypes=(), layer=3)])
    with pytest.raises(FAILS, match=r"UNAVAILABLE.*the peer has closed the channel"):
        recv_all([reader], [Mail(layer=4)])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (frame(MESSAGE, 1, magic=1), f"a frame begins with 1 instead of {FRAME}"),
        (frame(0, 1), "a frame of a type that is not for a reader: 0"),
        (frame(CREDIT, 1), "a frame of a type that is not for a reader: 2"),
        (frame(2**32 - 1, 1), "a frame of a type that is not for a reader: 4294967295"),
        (message(Mail(), 0), "a message out of order: expected 1, got 0"),
        (message(Mail(), 2**64 - 1), "a message out of order: expected 1, got 18446744073709551615"),
        (message(Mail(), 1, payload_bytes=4097), "the message has 4097 bytes and a slot of the ring 4096"),
        (message(Mail(), 1, payload_bytes=2**64 - 1), "the message has 18446744073709551615 bytes and a slot"),
        (message(Mail(layer=1), 1) + message(Mail(layer=2), 2), "message 2, for which no slot was free"),
        (frame(CLOSED, 2), "its last word is of another number of messages than came: expected 1, got 2"),
        (frame(ABORTED, 0), "its last word is of another number of messages than came: expected 1, got 0"),
    ],
)
def test_writer_that_breaks_the_protocol(faked, wrong, words):
    """What came in order before is delivered; then both ends fail."""
    reader, line = faked("reader")
    line.say(message(mails(1)[0], 0) + wrong)
    line.hear(56)
    assert line.heard_the_end()
    good = 2 if "no slot" in words else 1
    recv_all([reader], [Mail(layer=layer) for layer in range(good)])
    with pytest.raises(FAILS) as error:
        recv_all([reader], [Mail(layer=good)])
    expected = f"from the peer (pid {os.getpid()}) failed: it does not keep to the protocol: {words}"
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (frame(CREDIT, 1, magic=2**32 - 1), f"a frame begins with 4294967295 instead of {FRAME}"),
        (message(Mail(), 0), "a frame of a type that is not for a writer: 1"),
        (frame(5, 0), "a frame of a type that is not for a writer: 5"),
        (frame(CREDIT, 3), "it gave back another number of messages than can be: expected 0 to 2, got 3"),
        (frame(CREDIT, 1) + frame(CREDIT, 0), "another number of messages than can be: expected 1 to 2, got 0"),
        (frame(CLOSED, 2**64 - 1), "another number of messages than can be: expected 0 to 2, got 18446744073709551615"),
        (frame(ABORTED, 4), "another number of messages than can be: expected 0 to 2, got 4"),
    ],
)
def test_reader_that_breaks_the_protocol(faked, wrong, words):
    writer, line = faked("writer")
    send_all([writer], mails(2))
    line.hear(2 * (56 + 64))
    line.say(wrong)
    with pytest.raises(FAILS) as error:
        send_all([writer], [Mail(layer=layer) for layer in range(2, 4)])
    expected = f"to the peer (pid {os.getpid()}) failed: it does not keep to the protocol: "
    assert expected in str(error.value)
    assert words in str(error.value)


def test_random_bytes_from_the_peer(faked):
    """Whatever comes is delivered as it was meant or is an error."""
    seeded = random.Random(5)
    for _ in range(20):
        reader, line = faked("reader", timeout_s=0.2)
        good = message(mails(1)[0], 0)
        noise = bytearray(good + message(mails(2)[1], 1) + frame(CLOSED, 2))
        for _ in range(seeded.randint(1, 4)):
            noise[seeded.randrange(len(good), len(noise))] ^= 1 << seeded.randrange(8)
        line.say(bytes(noise))
        recv_all([reader], mails(1))
        with contextlib.suppress(OSError):  # not connected any more
            line.socket.shutdown(socket.SHUT_WR)
        with pytest.raises(FAILS):
            recv_all([reader], [Mail(layer=layer) for layer in range(1, 3)])
        reader.close()


@pytest.mark.parametrize("cut", [0, 30, 56, 100])
def test_connection_that_ends_within_a_message(faked, cut):
    reader, line = faked("reader")
    line.say(message(mails(1)[0], 0) + message(Mail(layer=1), 1)[:cut])
    line.socket.close()
    assert_arrived(reader, mails(1))
    with pytest.raises(FAILS, match=r"UNAVAILABLE.*layer 1, batch 0\).*the peer process has died"):
        recv_all([reader], [Mail(layer=1)])


def test_reset_connection_is_a_dead_peer(faked):
    reader, line = faked("reader")
    line.say(message(mails(1)[0], 0))
    line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    line.socket.close()
    assert_arrived(reader, mails(1))
    with pytest.raises(FAILS, match="the peer process has died"):
        recv_all([reader], [Mail(layer=1)])


def test_writer_waits_for_credit(faked, background):
    writer, line = faked("writer")
    sending = background.submit(send_all, [writer], mails(3))
    assert line.hear(2 * (56 + 64))[56 + 64 :][:56] == message(mails(2)[1], 1)[:56]
    line.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        line.socket.recv(1)
    line.socket.settimeout(LIMIT_S)
    line.say(frame(CREDIT, 1))
    assert line.hear(56 + 64)[:56] == message(mails(3)[2], 2)[:56]
    sending.result(LIMIT_S)


def test_half_said_frame_does_not_keep_close_waiting_for_ever(faked):
    """A peer that takes nothing: large messages fill the socket, and closing gives up on them."""
    writer, line = faked("writer", slot_bytes=1 << 24)
    send_all([writer], mails(2, words=1 << 22))
    writer.close()
    assert writer.failure is None
    assert line.hear(56)[:8] == struct.pack("<II", FRAME, MESSAGE)


@pytest.fixture
def waiting_end(close_later):
    """A creator that has not connected, and the end that waits for it."""
    mine = create("tcp", role="writer", peer="attention worker 1", messages=[], slot_bytes=64)
    close_later(mine)
    other = attach(mine.address, role="reader", peer="the engine")
    close_later(other)
    return mine, other


def assert_they_meet(mine: Channel, other: Channel) -> None:
    mine.connect(other.answer)
    send_all([mine], mails(1))
    assert_arrived(other, mails(1))


def hang_up(stranger: socket.socket) -> None:
    stranger.close()


def garbage(stranger: socket.socket) -> None:
    stranger.sendall(b"GET / HTTP/1.1\r\nHost: attention\r\n\r\n" + bytes(100))


def half_a_hello(stranger: socket.socket) -> None:
    stranger.sendall(HELLO + bytes(16))


def wrong_token(stranger: socket.socket) -> None:
    stranger.sendall(HELLO + bytes(32))


def silence(stranger: socket.socket) -> None:
    pass


@pytest.mark.parametrize("does", [hang_up, garbage, half_a_hello, wrong_token, silence])
def test_strangers_on_the_port(waiting_end, close_later, does):
    mine, other = waiting_end
    for _ in range(20):
        stranger = socket.create_connection(port(other.answer), timeout=LIMIT_S)
        close_later(stranger)
        does(stranger)
    assert_they_meet(mine, other)
    with pytest.raises(ConnectionRefusedError), socket.create_connection(port(other.answer), timeout=LIMIT_S):
        pass


def test_stranger_who_says_nothing_is_dropped(waiting_end, close_later):
    mine, other = waiting_end
    stranger = Line(socket.create_connection(port(other.answer)))
    close_later(stranger.socket)
    assert stranger.heard_the_end()
    assert_they_meet(mine, other)


def test_wrong_token_names_the_peer(waiting_end, close_later):
    mine, other = waiting_end
    another = create("tcp", role="writer", peer="attention worker 1", messages=[], slot_bytes=64)
    close_later(another)
    words = rf"attention worker 1 \(pid {os.getpid()} on .*\) at 127\.0\.0\.1, port \d+ did not take the token"
    with pytest.raises(OSError, match=words):
        another.connect(other.answer)
    assert not another.connected
    assert_they_meet(mine, other)


def test_nobody_at_the_port(waiting_end):
    mine, other = waiting_end
    answer = other.answer
    other.close()
    with pytest.raises(OSError, match=r"cannot connect to attention worker 1 \(pid .*Connection refused"):
        mine.connect(answer)


def answer_of(other: Channel, listener: socket.socket) -> ChannelAddress:
    assert other.answer is not None
    where = msgspec.json.decode(other.answer.location) | {"port": listener.getsockname()[1]}
    return msgspec.structs.replace(other.answer, location=msgspec.json.encode(where).decode())


def test_acceptor_that_is_silent(waiting_end, close_later, monkeypatch):
    mine, other = waiting_end
    monkeypatch.setattr(tcp, "_CONNECT_S", 0.2)
    words = r"no welcome came from attention worker 1 \(pid .*timed out"
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(TimeoutError, match=words):
        mine.connect(answer_of(other, listener))
    assert_they_meet(mine, other)


def test_acceptor_of_something_else(waiting_end, background):
    mine, other = waiting_end

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            assert Line(connection).hear(40)[:8] == HELLO
            connection.sendall(b"220 smtp ready\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = background.submit(serve, listener)
        with pytest.raises(OSError, match="expected a welcome, got b'220 smtp'"):
            mine.connect(answer_of(other, listener))
        serving.result(LIMIT_S)
    assert_they_meet(mine, other)


def test_addresses_that_say_nothing(waiting_end):
    mine, other = waiting_end
    wrong = msgspec.structs.replace(mine.address, location='{"token": "secret"}')
    with pytest.raises(ValueError, match=r"expected the engine's end of a tcp channel, got a location that does not"):
        attach(wrong, role="reader", peer="the engine")
    assert other.answer is not None
    with pytest.raises(ValueError, match="expected how to reach attention worker 1's end of a tcp channel"):
        mine.connect(msgspec.structs.replace(other.answer, location="what?"))
    with pytest.raises(OSError, match=r"cannot listen on 192\.0\.2\.1, which has to be an address of this host"):
        attach(mine.address, role="reader", peer="the engine", host="192.0.2.1")


def test_ipv6(close_later):
    mine = create("tcp", role="writer", peer="the peer", messages=[], slot_bytes=64)
    close_later(mine)
    try:
        other = attach(mine.address, role="reader", peer="the engine", host="::1")
    except OSError as error:
        pytest.skip(f"this host has no IPv6: {error}")
    close_later(other)
    assert_they_meet(mine, other)


def test_peer_on_another_host_is_named(close_later, monkeypatch):
    mine = create("tcp", role="reader", peer="attention worker 1", messages=[], timeout_s=0.1)
    close_later(mine)
    with monkeypatch.context() as there:
        there.setattr(socket, "gethostname", lambda: "hostb")
        other = attach(mine.address, role="writer", peer="the engine")
    close_later(other)
    mine.connect(other.answer)
    assert (mine.peer_pid, other.peer_pid) == (None, None)
    with pytest.raises(FAILS, match=rf"from attention worker 1 \(pid {os.getpid()} on hostb\) failed: no message came"):
        recv_all([mine], [Mail()])


def test_more_memory_than_there_is_fails_at_once():
    with pytest.raises(OSError, match=r"cannot reserve .* bytes of memory for slots"):
        create("tcp", role="writer", peer="the peer", messages=[], slot_bytes=1 << 60, num_slots=64)
    with pytest.raises(OSError, match=r"cannot reserve .* bytes of memory for slots"):
        create("tcp", role="writer", peer="the peer", messages=[], slot_bytes=1 << 46, num_slots=1)


def until_it_fails(channel: Channel, expected: list[Mail]) -> str:
    """Receives and compares messages one by one; returns the first failure."""
    with pytest.raises(FAILS) as error:  # noqa: PT012
        for mail in expected:
            assert_arrived(channel, [mail])
    return str(error.value)


@pytest.mark.parametrize("how", ["close", "exit", "kill"])
def test_messages_of_a_peer_that_ends_at_once(mortal_peer, close_later, how):
    """More than sockets hold, and nobody reads before the peer has ended. A killed one had sent what it had sent."""
    large = mails(4, words=1 << 20)
    mine = create("tcp", role="reader", peer="the peer", messages=[], num_slots=8, slot_bytes=4 << 20)
    close_later(mine)
    theirs = mortal_peer.join_to(mine)
    if how == "close":
        mortal_peer.do("send", theirs, [large], [0])
        mortal_peer.do("close", theirs)
    else:
        mortal_peer.start({"exit": "send_and_exit", "kill": "send_and_die"}[how], theirs, large)
        mortal_peer.join()
    if how != "kill":
        assert_arrived(mine, large)
        with pytest.raises(FAILS, match="the peer has closed the channel"):
            recv_all([mine], [Mail(layer=4)])
        return
    assert "the peer process has died" in until_it_fails(mine, [*large, Mail(layer=4)])


@pytest.mark.parametrize("seed", range(3))
def test_peer_killed_during_large_transfers(mortal_peer, close_later, seed):
    """Whole messages come, or an error."""
    mine = create("tcp", role="reader", peer="the peer", messages=[], num_slots=3, slot_bytes=4 << 20)
    close_later(mine)
    theirs = mortal_peer.join_to(mine)
    large = mails(30, words=1 << 20)
    mortal_peer.start("send", theirs, [large[i : i + 5] for i in range(0, 30, 5)], [0] * 6)
    before = random.Random(seed).randint(1, 15)
    assert_arrived(mine, large[:before])
    mortal_peer.signal(signal.SIGKILL)
    words = f"from the peer (pid {mortal_peer.pid}) failed: the peer process has died"
    assert words in until_it_fails(mine, large[before:])


def test_reader_killed_during_large_transfers(mortal_peer, close_later):
    mine = create("tcp", role="writer", peer="the peer", messages=[], num_slots=3, slot_bytes=4 << 20)
    close_later(mine)
    theirs = mortal_peer.join_to(mine)
    large = mails(20, words=1 << 20)
    mortal_peer.start("recv_and_die", theirs, large[0])
    with pytest.raises(FAILS, match="the peer process has died"):
        send_all([mine], large)


@pytest.mark.parametrize(("end", "words"), [("close", "has closed"), ("abort", "has aborted")])
def test_reader_that_stops_during_large_transfers(mortal_peer, close_later, background, end, words):
    """What it leaves unread does not turn its last word into a broken connection."""
    mine = create("tcp", role="writer", peer="the peer", messages=[], num_slots=3, slot_bytes=4 << 20)
    close_later(mine)
    theirs = mortal_peer.join_to(mine)
    large = mails(20, words=1 << 20)
    sending = background.submit(send_all, [mine], large)
    mortal_peer.do("recv", theirs, [large[:2]], [0])
    mortal_peer.do("end", theirs, end)
    assert f"the peer {words} the channel" in str(sending.exception(LIMIT_S))


def test_stopped_peer_without_room_is_not_lost(mortal_peer, close_later):
    """Its kernel answers, however long it takes nothing; so the wait ends with its own limit."""
    mine = create("tcp", role="writer", peer="the peer", messages=[], num_slots=2, slot_bytes=1 << 25, timeout_s=7.0)
    close_later(mine)
    mortal_peer.join_to(mine)
    mortal_peer.signal(signal.SIGSTOP)
    with pytest.raises(
        FAILS, match=r"DEADLINE_EXCEEDED: send .* no slot of the ring came free in 7 s, though the peer"
    ):
        send_all([mine], mails(3, words=1 << 23))


def test_forked_child_ends_nothing(close_later, mortal_peer):
    mine = create("tcp", role="writer", peer="the peer", messages=[], slot_bytes=64)
    close_later(mine)
    theirs = mortal_peer.join_to(mine)
    assert mortal_peer.do("fork_and_close", theirs) == 0
    send_all([mine], mails(1))
    (got,) = mortal_peer.do("recv", theirs, [mails(1)], [0])
    np.testing.assert_array_equal(got[0], mails(1)[0].contents()[0])


def test_between_hosts():
    """Two network namespaces, and a link that goes down."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("needs unshare and ip")
    command = ["unshare", "--map-root-user", "--net", "--uts", "--mount"]
    if subprocess.run([*command, "true"], capture_output=True).returncode != 0:
        pytest.skip("this user may not make namespaces")
    done = subprocess.run([*command, sys.executable, str(HERE / "tcp_hosts.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ends_under_thread_sanitizer(tmp_path):
    calls = HERE.parent.parent / "custom_calls"
    sources = [HERE / "tcp_race.cc", *(calls / f"{name}.cc" for name in ("channel_end", "tcp_accept", "tcp_channel"))]
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=thread", f"-I{calls}"]
    binary = tmp_path / "tcp_race"
    subprocess.run(
        ["g++", *flags, *map(str, [*sources, calls / "wording.cc"]), "-o", str(binary)], check=True, timeout=120
    )
    # -R: the sanitizer of older compilers does not know how far newer kernels spread addresses.
    done = subprocess.run(["setarch", "-R", str(binary)], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout.splitlines()) == (
        0,
        ["5000 messages", "aborted: 1", "closed after 2000 of 2000"],
    ), done.stdout + done.stderr
