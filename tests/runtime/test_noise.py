"""What workers of a cluster make of port scans, strangers and messages that are none."""

import contextlib
import dataclasses
import itertools
import json
import random
import re
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from cluster_process import SETTINGS, tokens
from control_ends import HERE, LOOPBACK, Raw, ignore, linked, process, received, wait_until
from control_peer import Ping, Pong
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import cluster_file, command

from lamina_jax import LLM
from lamina_jax.attention.params import AttendParams
from lamina_jax.runtime import control_wire as wire
from lamina_jax.runtime import messages
from lamina_jax.runtime.cluster import load_cluster
from lamina_jax.runtime.cluster_key import ClusterKey
from lamina_jax.runtime.plan import decode_plan
from lamina_jax.runtime.sampler import SamplingTensors
from lamina_jax.testing import write_tiny_checkpoint
from lamina_jax.transport import ChannelAddress

STRANGERS_ROOM = 8 << 20
"""Bytes that a process may grow by, whatever comes: allocators keep some of what was freed."""


def visit(address: str, data: bytes = b"") -> None:
    """Connects over TCP, says something and hangs up."""
    host, port = address.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection, contextlib.suppress(OSError):
        connection.sendall(data)


class Served:
    """A worker in a process of its own, as the tests of noise see it."""

    def __init__(self, child: subprocess.Popen[str], line: Callable[[], str], key: ClusterKey | None):
        self._process = psutil.Process(child.pid)
        self._line = line
        self.pid = child.pid
        self.address = line()
        self.key = key

    def rss(self) -> int:
        return self._process.memory_info().rss

    def counters(self) -> dict[str, int]:
        self._process.send_signal(signal.SIGUSR1)
        return json.loads(self._line())

    def converse(self) -> None:
        with linked(self.address, self.key) as link:
            link.open(60.0, ignore)
            link.send(Ping(1))
            assert received(link) == Pong(1)


@pytest.fixture(params=["key", "no key"])
def served(request, key, key_file) -> Iterator[Served]:
    ours, file = (key, key_file) if request.param == "key" else (None, None)
    with process("worker", LOOPBACK, file) as (child, line):
        served = Served(child, line, ours)
        served.converse()
        wait_until(lambda: served.counters()["left"] == 1, "the first engine to leave")
        yield served
        served.converse()


GREETING = b"\xff\0\0\0\0\0\0\0\1\x7f\3\1"
NOISE = [
    b"",
    b"GET / HTTP/1.1\r\nHost: worker\r\n\r\n" * 20,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(512),
    GREETING,
    GREETING + b"NULL".ljust(20, b"\0") + bytes(32),
    GREETING + b"CURVE".ljust(20, b"\0") + bytes(32) + b"\4\xc8\5HELLO" + bytes(194),
    GREETING + b"CURVE".ljust(20, b"\0") + bytes(32) + b"\6" + (1 << 62).to_bytes(8) + bytes(1000),
    b"\xff" * 1000,
]


def test_port_scan(served):
    size = served.rss()
    for _ in range(40):
        for data in NOISE:
            visit(served.address, data)
    half_open = [socket.create_connection(("127.0.0.1", int(served.address.split(":")[2]))) for _ in range(50)]
    sent = 40 * len(NOISE) + len(half_open)

    def counted() -> bool:
        now = served.counters()
        return now["handshakes_failed"] + now["cut_off"] == sent

    # Those that say nothing are hung up on after 5 s.
    wait_until(counted, f"{sent} connections to be counted as failed")
    for connection in half_open:
        connection.close()
    counters = served.counters()
    assert counters.pop("connections") == sent + 1
    assert counters.pop("handshakes_failed") + counters.pop("cut_off") == sent
    assert counters == {**dict.fromkeys(counters, 0), "opened": 1, "left": 1}
    assert served.rss() - size < STRANGERS_ROOM


def test_connections_that_say_nothing_take_all_file_descriptors(served):
    """A session goes on meanwhile, and others come when ZeroMQ has hung up."""
    resource.prlimit(served.pid, resource.RLIMIT_NOFILE, (100, 100))
    with linked(served.address, served.key) as link, contextlib.ExitStack() as stack:
        link.open(60.0, ignore)
        port = int(served.address.split(":")[2])
        for _ in range(150):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        wait_until(lambda: served.counters()["connections"] > 50, "the worker to be out of file descriptors")
        for number in range(10):
            link.send(Ping(number))
            assert received(link) == Pong(number)
        link.close()
        served.converse()
    assert served.counters()["handshakes_failed"] > 50


def test_ten_thousand_messages_of_noise(served):
    """From a client with the key, which has opened a session, and from clients that are none."""
    choose = random.Random(5)
    size = served.rss()
    messages, visits = 9500, 500
    with Raw(served.address, served.key) as raw:
        templates = messages_of(raw.open(), PINGS)
        for _ in range(messages):
            raw.socket.send_multipart(mutated(choose, templates))
        for _ in range(visits):
            data = choose.choice(NOISE)
            visit(served.address, data[: choose.randrange(len(data) + 1)] + choose.randbytes(choose.randrange(300)))

        def counted() -> bool:
            now = served.counters()
            ended = now.pop("handshakes_failed") + now.pop("cut_off") + now.pop("left")
            # The first engine's connection and its Open, the opening above, and the noise, in which the first Bye is
            # taken at its word.
            return (ended, now.pop("connections"), sum(now.values())) == (1 + visits, 2 + visits, 2 + messages - 1)

        wait_until(counted, "all to be counted")
    wait_until(lambda: served.counters()["left"] == 2, "the noisy client to leave")
    counters = served.counters()
    assert min(counters[kind] for kind in ("malformed", "replayed", "unknown_session")) > 0
    assert served.rss() - size < STRANGERS_ROOM


PINGS = (Ping(1), Ping(2, bytes(300)), Pong(1))


def messages_of(session: bytes, said: Sequence[Any]) -> list[list[bytes]]:
    """Messages with numbers that are not the next."""
    said = [wire.Open(HERE), wire.Beat(), wire.Close("x"), *said, wire.Bye()]
    return [wire.pack(session, 1000 + i, wire.encode(message)) for i, message in enumerate(said)]


def mutated(choose: random.Random, templates: list[list[bytes]]) -> list[bytes]:
    """Frames that are no message of any session, but often nearly one, or one that comes again."""
    frames = list(choose.choice(templates))
    for _ in range(choose.randrange(4)):
        at = choose.randrange(len(frames))
        frame = bytearray(frames[at])
        place = choose.randrange(len(frame) + 1)
        match choose.randrange(6):
            case 0:
                frame[place : place + 1] = choose.randbytes(1)
            case 1:
                del frame[place:]
            case 2:
                frame[place:place] = choose.randbytes(choose.randrange(20))
            case 3:
                frame = bytearray(choose.randbytes(choose.randrange(200)))
            case 4:
                frames.insert(at, bytes(frame))
            case 5:
                frames.append(choose.choice(templates)[-1])
        frames[at] = bytes(frame)
    return frames


# One of each message that a worker of a cluster takes.
_BUCKET = messages.Bucket(batch=4, tokens=1, max_pages=8)
_END = ChannelAddress(kind="verbs", location="{}", num_slots=8, slot_bytes=4096, creator_role="writer")
_ATTENTION = messages.AttentionWorkerConfig(
    name="attention worker 0",
    layers=(AttendParams(scale=0.5),),
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    dtype="float32",
    page_size=16,
    num_pages=8,
    max_step_tokens=64,
    kernel="paged",
)
_FACTS = messages.ModelFacts(num_layers=2, num_heads=6, num_kv_heads=3, head_dim=8, vocab_size=260, dtype="float32")
_PLACEMENT = messages.Placement(
    model_platform="cpu",
    attention_platform="cpu",
    num_attention_workers=2,
    tensor_parallel_size=1,
    num_batches=1,
    model_memory_fraction=None,
)
_SETTINGS = messages.ExecutorSettings(
    page_size=16,
    num_pages=8,
    kv_cache_dtype="auto",
    attention_platform="cpu",
    attention_kernel="auto",
    max_num_seqs=4,
    max_step_tokens=64,
    num_batches=1,
    overlap=True,
    timeout_s=60.0,
    trace_dir=None,
)
_SAMPLING = {field.name: bytes(16) for field in dataclasses.fields(SamplingTensors)}
_PLAN = messages.PlannedBatch(
    bucket=_BUCKET,
    batch=0,
    tokens=None,
    slots=bytes(16),
    context_lens=bytes(16),
    num_new=bytes(16),
    block_tables=bytes(128),
    emits=bytes(4),
    sampling=_SAMPLING,
    sampling_mode="greedy",
)
_TO_ATTENTION = (
    messages.Describe(),
    messages.Configure(config=_ATTENTION, messages=("q",), inboxes=(_END,), outboxes=(_END,)),
    messages.Prepare(_BUCKET, 1),
    messages.RunStep(_BUCKET, (0,), bytes(16), bytes(16), bytes(128)),
)
_TO_MODEL = (
    messages.LoadModel(
        directory="/model",
        facts=_FACTS,
        dtype="float32",
        placement=_PLACEMENT,
        attention_workers=("tcp://127.0.0.1:1",),
        transport="auto",
        start_timeout_s=1.0,
    ),
    messages.MakeExecutor(_SETTINGS),
    messages.Prepare(_BUCKET, 1),
    messages.RunPlans(0, (_PLAN,)),
)
TAKEN = {
    "ping": (Ping, PINGS),
    "attention worker": (messages.ToClusterWorker, _TO_ATTENTION),
    "model worker": (messages.ToModelWorker, _TO_MODEL),
}
"""By who takes them: the type of the messages, and some of them."""
takers = pytest.mark.parametrize("taker", TAKEN)


class Launched:
    """A worker that a launch script runs."""

    def __init__(self, script: str, *flags: str, address: str, log: Path):
        self.address = address
        self._log = log
        with log.open("w") as file:
            self._popen = subprocess.Popen(command(script, *flags), stderr=file)
        self._process = psutil.Process(self._popen.pid)

    def rss(self) -> int:
        return self._process.memory_info().rss

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def sessions(self) -> int:
        """How many it has served, or begun to serve."""
        return self.log.count(": session with ")

    def end(self) -> dict[str, int]:
        """Has it end; returns what came to it."""
        self._popen.terminate()
        assert self._popen.wait(60) == 0
        (counters,) = re.findall(rf"ended; came to {self.address}: (.*)", self.log)
        return {name: int(count) for name, count in re.findall(r"([a-z ]+) (\d+)(?:, |$)", counters)}

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait()


def ask(raw: Raw, number: int) -> Any:
    """What a worker answers to a request for a session: all that was sent before has come to it then."""
    request, deadline = number.to_bytes(16), time.monotonic() + 60
    raw.say(request, 0, wire.Open(HERE))
    while True:
        assert raw.socket.poll(max(int(1000 * (deadline - time.monotonic())), 0)), "no answer within 60 s"
        frames = raw.socket.recv_multipart()
        # Before that may come whatever it says in a session.
        if wire.unpack(frames, msgspec.msgpack.Decoder())[0] == request:
            return wire.unpack(frames, msgspec.msgpack.Decoder(wire.ToEngine))[2]


def open_when_free(raw: Raw, requests: Iterator[int]) -> bytes:
    """Opens a session, once the one before is over; returns its number."""
    answer = wait_until(lambda: opened if isinstance(opened := ask(raw, next(requests)), wire.Opened) else None, "room")
    return answer.session


def make_noise(address: str, key: ClusterKey, said: Sequence[Any], *, num_messages: int, num_visits: int) -> None:
    """Of somebody who has the key but no session, and of strangers."""
    choose = random.Random(5)
    templates = messages_of(bytes(range(16)), said)
    with Raw(address, key) as raw:
        for _ in range(num_messages):
            raw.socket.send_multipart(mutated(choose, templates))
        for _ in range(num_visits):
            data = choose.choice(NOISE)
            visit(address, data[: choose.randrange(len(data) + 1)])
        assert "busy" in ask(raw, 1).reason


def make_senseless_sessions(worker: Launched, key: ClusterKey, taker: str, count: int) -> int:
    """Sessions whose messages are numbered as they should be, and damaged, or right and out of turn.

    Returns how often they asked for a session.
    """
    choose, requests, before = random.Random(5), itertools.count(1), worker.sessions
    taken, said = TAKEN[taker]
    for i in range(count):
        with Raw(worker.address, key) as raw:
            session = open_when_free(raw, requests)
            # With its first message a session begins.
            raw.say(session, 0, wire.Beat())
            wait_until(lambda begun=before + i + 1: worker.sessions == begun, "the session to begin")
            number = 1
            for _ in range(3):
                _, body = mutated(choose, [wire.pack(session, number, wire.encode(choose.choice(said)))])[:2]
                frames = [wire.pack(session, number, b"")[0], body]
                raw.socket.send_multipart(frames)
                # What does not decode is not counted as one of the session's.
                number += decode(frames, taken) is not None
            ask(raw, next(requests))
    return next(requests) - 1


def test_workers_generate_through_noise(tmp_path, key, key_file):
    """Real ones: beside the session of an engine, and in sessions of their own, after which an engine has one again."""
    directory, file = tmp_path / "model", tmp_path / "cluster.py"
    write_tiny_checkpoint(directory, "gqa")
    with LLM(directory, num_attention_workers=0, **SETTINGS) as llm:
        expected = tokens(llm)
    model, attention = cluster_file(file, key_file=str(key_file))
    flags, names = f"--cluster={file}", ("model worker", "attention worker")
    with contextlib.ExitStack() as stack:
        workers = [
            Launched("launch_model_worker.py", flags, address=model, log=tmp_path / "model.log"),
            Launched("launch_attention_worker.py", flags, "--index=0", address=attention, log=tmp_path / "0.log"),
        ]
        for worker in workers:
            stack.callback(worker.kill)
        pool = stack.enter_context(ThreadPoolExecutor(2))
        with LLM(directory, cluster=load_cluster(file), **SETTINGS) as llm:
            for _ in range(3):
                assert tokens(llm) == expected
            sizes = [worker.rss() for worker in workers]
            noise = [
                pool.submit(make_noise, worker.address, key, TAKEN[name][1], num_messages=4800, num_visits=200)
                for worker, name in zip(workers, names, strict=True)
            ]
            while not all(each.done() for each in noise):
                assert tokens(llm) == expected
            for each in noise:
                each.result()
            assert tokens(llm) == expected
            assert max(worker.rss() - size for worker, size in zip(workers, sizes, strict=True)) < STRANGERS_ROOM
        asked = [
            make_senseless_sessions(worker, key, name, count=15) for worker, name in zip(workers, names, strict=True)
        ]
        with LLM(directory, cluster=load_cluster(file), **SETTINGS) as llm:
            assert tokens(llm) == expected
        for worker, refusal, num_asked in zip(
            workers, ("came out of turn", "came before Configure"), asked, strict=True
        ):
            assert worker.sessions == 17
            counters = worker.end()
            assert refusal in worker.log
            noted = [counters[name] for name in ("malformed", "unknown session", "refused busy")]
            assert min(noted) > 0, counters
            # But for the first Bye, which is taken at its word.
            others = ("oversize", "refused mismatch", "replayed")
            assert sum(noted) + sum(counters[name] for name in others) - num_asked >= 4800 - 1, counters
            assert counters["handshakes failed"] + counters["cut off"] >= 200 + 15, counters


def decode(frames: list[bytes], taken: Any) -> Any | None:
    """The message; None for a ValueError. There is nothing else."""
    decoder = msgspec.msgpack.Decoder(taken | wire.FromEngine)
    with contextlib.suppress(ValueError):
        session, sequence, message = wire.unpack(frames, decoder)
        assert len(session) == 16
        assert sequence >= 0
        assert isinstance(message, taken | wire.FromEngine)
        return message
    return None


@takers
def test_every_message_comes_through(taker):
    taken, said = TAKEN[taker]
    sent = [message for message in said if isinstance(message, taken)]
    frames = [wire.pack(bytes(16), 0, wire.encode(message)) for message in sent]
    assert sent
    assert [decode(each, taken) for each in frames] == sent
    # Damaged ones are decoded further, too.
    assert decode_plan(_PLAN).slots.tolist() == [0] * 4


@pytest.mark.parametrize(
    ("taker", "message"),
    [
        ("attention worker", messages.Prepare(messages.Bucket(batch=-1, tokens=1, max_pages=8), 1)),
        ("attention worker", messages.Prepare(_BUCKET, 0)),
        ("attention worker", messages.RunStep(_BUCKET, (-1,), bytes(16), bytes(16), bytes(128))),
        ("attention worker", messages.RunStep(_BUCKET, (), b"", b"", b"")),
        ("model worker", messages.RunPlans(0, ())),
        ("model worker", messages.RunPlans(0, (msgspec.structs.replace(_PLAN, batch=-1),))),
    ],
)
def test_numbers_that_count_nothing_are_refused(taker, message):
    assert decode(wire.pack(bytes(16), 0, wire.encode(message)), TAKEN[taker][0]) is None


@takers
@settings(max_examples=500)
@given(frames=st.lists(st.binary(max_size=200), max_size=5))
def test_random_frames_decode_to_a_message_or_an_error(taker, frames):
    decode(frames, TAKEN[taker][0])


@takers
@settings(max_examples=1500)
@given(seed=st.integers())
def test_mutated_frames_decode_to_a_message_or_an_error(taker, seed):
    taken, said = TAKEN[taker]
    message = decode(mutated(random.Random(seed), messages_of(bytes(range(16)), said)), taken)
    if isinstance(message, messages.RunPlans):
        for batch in message.batches:
            with contextlib.suppress(ValueError):
                decode_plan(batch)


@pytest.mark.parametrize(
    "body", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\x91" * 100_000, b"\xc6\xff\xff\xff\xff"]
)
def test_a_body_that_promises_much_takes_no_memory(body):
    header = msgspec.msgpack.encode([bytes(16), 0])
    with pytest.raises(ValueError):  # noqa: PT011 - whatever it says
        wire.unpack([header, body], msgspec.msgpack.Decoder(Ping | wire.FromEngine))
