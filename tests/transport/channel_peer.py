"""The process at the other end of the channels under test, and what both ends know about the messages."""

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import signal
import socket
import subprocess
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection

import answering
import jax
import jax.numpy as jnp
import numpy as np

from lamina_jax import _custom_calls
from lamina_jax.transport import (
    Channel,
    ChannelAddress,
    Role,
    Tag,
    attach,
    channel_class,
    cuda,
    make_stamp,
    recv,
    send,
    verbs,
)

DTYPES = ("bfloat16", "float16", "float32", "int32")
LIMIT_S = 60.0  # what no answer of a healthy peer takes
ON_CPU: dict[str, dict] = {"shm": {}, "tcp": {}, "cuda_host": {"device": None}, answering.KIND: {}}
"""The kinds whose ends a CPU can operate both, and what `create` has to be told for it."""
OVER_NETWORKS = ("tcp", "verbs")
DEATH = {"verbs": "the peer does not answer any more: its process or host has died, or the link is down"}
"""What a kind says of a peer that was killed, where that is not "the peer process has died"."""

if verbs.rdma_problem() is None:
    ON_CPU["verbs"] = {}

answering.register()


def create(kind: str, **options) -> Channel:
    """`Channel.create` for the CPU, unless told otherwise."""
    return channel_class(kind).create(**(ON_CPU.get(kind, {}) | options))


@dataclasses.dataclass(frozen=True)
class Mail:
    """One message of a test, with contents that follow from `seed`."""

    shapes: tuple[tuple[int, ...], ...] = ((4,),)
    dtypes: tuple[str, ...] = ("float32",)
    tag: Tag = Tag.Q
    step: int = 0
    layer: int = 0
    batch: int = 0
    seed: int = 0

    @property
    def specs(self) -> list[jax.ShapeDtypeStruct]:
        return [
            jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]

    def contents(self) -> list[np.ndarray]:
        rng = np.random.default_rng(self.seed)
        return [rng.integers(-100, 100, spec.shape).astype(spec.dtype) for spec in self.specs]


def send_all(channels: Sequence[Channel], mails: Sequence[Mail]) -> None:
    """Sends in one program."""

    def program(stamp, contents):
        for before, mail, tensors in zip([None, *mails], mails, contents, strict=False):
            stamp = send(channels, _advance(stamp, before, mail), tensors, tag=mail.tag)
        return stamp

    contents = [[jnp.asarray(x) for x in mail.contents()] for mail in mails]
    jax.jit(program)(_first(mails), contents).block_until_ready()
    _raise_failure(channels)


def recv_all(channels: Sequence[Channel], mails: Sequence[Mail]) -> list[list[np.ndarray]]:
    """Receives in one program."""

    def program(stamp):
        received = []
        for before, mail in zip([None, *mails], mails, strict=False):
            tensors, stamp = recv(channels, _advance(stamp, before, mail), mail.specs, tag=mail.tag)
            received.append(tensors)
        return received, stamp

    received, _ = jax.tree.map(np.asarray, jax.jit(program)(_first(mails)))
    _raise_failure(channels)
    return received


def echo(inbox: Channel, outbox: Channel, mail: Mail, count: int) -> None:
    """Receives and sends back `count` messages, in one scan."""

    def body(stamp, layer):
        stamp = stamp.at[1].set(layer)
        tensors, stamp = recv([inbox], stamp, mail.specs, tag=mail.tag)
        return send([outbox], stamp, tensors, tag=mail.tag), None

    layers = jnp.arange(count, dtype=jnp.int32)
    jax.jit(lambda: jax.lax.scan(body, make_stamp(0), layers)[0])().block_until_ready()
    _raise_failure([inbox, outbox])


def ping(outbox: Channel, inbox: Channel, mail: Mail, count: int) -> list[np.ndarray]:
    """The other side of `echo`: message i holds its contents plus i. Returns what came back, stacked."""
    contents = [jnp.asarray(x) for x in mail.contents()]

    def body(stamp, layer):
        stamp = send([outbox], stamp.at[1].set(layer), [x + layer.astype(x.dtype) for x in contents], tag=mail.tag)
        tensors, stamp = recv([inbox], stamp, mail.specs, tag=mail.tag)
        return stamp, tensors

    layers = jnp.arange(count, dtype=jnp.int32)
    received = [np.asarray(x) for x in jax.jit(lambda: jax.lax.scan(body, make_stamp(0), layers))()[1]]
    _raise_failure([outbox, inbox])
    return received


def _raise_failure(channels: Sequence[Channel]) -> None:
    """What a GPU's custom calls could not raise when they were called."""
    for channel in channels:
        if error := channel.error():
            raise error


def _first(mails: Sequence[Mail]) -> jax.Array:
    return make_stamp(mails[0].step, mails[0].layer, mails[0].batch)


def _advance(stamp: jax.Array, before: Mail | None, mail: Mail) -> jax.Array:
    """Adds what the stamp lacks: setting it outright would cut the dependence that keeps the order."""
    if before is None:
        return stamp
    ahead = [mail.step - before.step, mail.layer - before.layer, mail.batch - before.batch]
    return stamp + jnp.asarray(ahead, jnp.int32)


class Peer:
    """A process that holds other ends of channels and does with them what it is told, one order at a time."""

    def __init__(self, name: str, platforms: str = "cpu"):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, platforms), name=name, daemon=True)
        self._process.start()
        theirs.close()
        self._channels = itertools.count()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def start(self, order: str, *arguments: object) -> None:
        self._connection.send((order, arguments))

    def result(self):
        """Waits for the answer to the order started before; raises AssertionError with the peer's error."""
        assert self._connection.poll(LIMIT_S), "the peer process does not answer"
        fine, value = self._connection.recv()
        assert fine, value
        return value

    def do(self, order: str, *arguments: object):
        self.start(order, *arguments)
        return self.result()

    def create(self, kind: str, role: Role, **options) -> tuple[int, ChannelAddress]:
        """Lets the peer make a channel; returns the number by which later orders name it, and the address."""
        number = next(self._channels)
        return number, self.do("create", number, kind, role, options)

    def attach(self, address: ChannelAddress, **options) -> int:
        """Lets the peer take the free end; returns the number by which later orders name it."""
        number = next(self._channels)
        role = "reader" if address.creator_role == "writer" else "writer"
        self.do("attach", number, address, role, options)
        return number

    def join_to(self, channel: Channel, **options) -> int:
        """Lets the peer take the free end of a channel that this process made, and connects; as `attach`."""
        number = self.attach(channel.address, **options)
        channel.connect(self.do("answer", number))
        return number

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def join(self) -> None:
        """Waits until the process has ended."""
        self._process.join(LIMIT_S)
        assert self._process.exitcode is not None

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()


@contextlib.contextmanager
def running_peer(name: str, platforms: str = "cpu") -> Iterator[Peer]:
    peer = Peer(name, platforms)
    try:
        yield peer
    finally:
        peer.end()


class _Orders:
    """What a peer process can be told."""

    def __init__(self) -> None:
        self._channels: dict[int, Channel] = {}
        self._background: Future = Future()

    def attach(self, number: int, address: ChannelAddress, role: Role, options: dict) -> None:
        self._channels[number] = attach(address, role=role, peer="the test", **options)

    def create(self, number: int, kind: str, role: Role, options: dict) -> ChannelAddress:
        channel = create(kind, role=role, peer="the test", messages=[], **options)
        self._channels[number] = channel
        return channel.address

    def answer(self, number: int) -> ChannelAddress | None:
        return self._channels[number].answer

    def connect(self, number: int, answer: ChannelAddress | None) -> None:
        self._channels[number].connect(answer)

    def send(self, number: int, programs: Sequence[Sequence[Mail]], stalls_ms: Sequence[int]) -> None:
        for mails, stall_ms in zip(programs, stalls_ms, strict=True):
            time.sleep(stall_ms / 1e3)
            send_all([self._channels[number]], mails)

    def recv(self, number: int, programs: Sequence[Sequence[Mail]], stalls_ms: Sequence[int]) -> list:
        received = []
        for mails, stall_ms in zip(programs, stalls_ms, strict=True):
            time.sleep(stall_ms / 1e3)
            received.extend(recv_all([self._channels[number]], mails))
        return received

    def stream(self, number: int, count: int) -> None:
        """Sends, or receives, messages of 64 bytes, without XLA."""
        _custom_calls.stream(self._channels[number].id, 64, count, copies=True)

    def recv_batches(self, numbers: Sequence[int], mails: Sequence[Mail]) -> list:
        return recv_all([self._channels[number] for number in numbers], mails)

    def send_batches(self, numbers: Sequence[int], mails: Sequence[Mail]) -> None:
        send_all([self._channels[number] for number in numbers], mails)

    def echo(self, inbox: int, outbox: int, mail: Mail, count: int) -> None:
        echo(self._channels[inbox], self._channels[outbox], mail, count)

    def ping(self, outbox: int, inbox: int, mail: Mail, count: int) -> list[np.ndarray]:
        return ping(self._channels[outbox], self._channels[inbox], mail, count)

    def recv_and_die(self, number: int, mail: Mail) -> None:
        recv_all([self._channels[number]], [mail])
        os.kill(os.getpid(), signal.SIGKILL)

    def send_and_die(self, number: int, mails: Sequence[Mail]) -> None:
        send_all([self._channels[number]], mails)
        os.kill(os.getpid(), signal.SIGKILL)

    def send_and_exit(self, number: int, mails: Sequence[Mail]) -> None:
        send_all([self._channels[number]], mails)
        self._channels[number].close()
        os._exit(0)

    def fork_and_close(self, number: int) -> int:
        """Closes the channel in a child that shares it. Returns what became of the child, as `os.waitpid` does."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that JAX has threads, which this child does not need
            child = os.fork()
        if child == 0:
            self._channels[number].abort()
            self._channels[number].close()
            os._exit(0)
        return os.waitpid(child, 0)[1]

    def move_to_host(self, name: str) -> None:
        """Gives this process, in which nothing has been made yet, a network and a host name of its own."""
        os.unshare(os.CLONE_NEWNET | os.CLONE_NEWUTS)
        socket.sethostname(name)

    def run(self, command: Sequence[str]) -> None:
        subprocess.run(command, check=True)

    def recv_and_abort(self, number: int, mail: Mail, aborted: int) -> None:
        recv_all([self._channels[number]], [mail])
        self._channels[aborted].abort()

    def ask_in_background(self, there: int, back: int, mail: Mail) -> None:
        """Sends `mail`, then waits for an answer to it, in a thread."""

        def program(stamp):
            stamp = send([self._channels[there]], stamp, [jnp.asarray(x) for x in mail.contents()], tag=mail.tag)
            return recv([self._channels[back]], stamp, mail.specs, tag=Tag.ATTENDED)

        def ask() -> None:
            jax.block_until_ready(jax.jit(program)(_first([mail])))
            _raise_failure([self._channels[back]])

        self._background = ThreadPoolExecutor(1).submit(ask)

    def background_error(self) -> str:
        return str(self._background.exception(LIMIT_S))

    def end(self, number: int, how: str) -> None:
        """Calls `abort` or `close`."""
        getattr(self._channels[number], how)()

    def replay(self, there: int, back: int, mail: Mail, count: int) -> tuple[list[np.ndarray], int]:
        """As `ping`, but each round is a run of one small program. Returns also how many calls the host has made."""
        contents = [jnp.asarray(x) for x in mail.contents()]

        @jax.jit
        def program(stamp):
            layer = stamp[1]
            stamp = send([self._channels[there]], stamp, [x + layer.astype(x.dtype) for x in contents], tag=mail.tag)
            return recv([self._channels[back]], stamp, mail.specs, tag=mail.tag)

        stamps = [make_stamp(0, layer) for layer in range(count)]
        before = cuda.launch_count()
        received = [program(stamp)[0] for stamp in stamps]
        stacked = [np.stack([np.asarray(x) for x in tensors]) for tensors in zip(*received, strict=True)]
        _raise_failure([self._channels[there], self._channels[back]])
        return stacked, cuda.launch_count() - before

    def failure(self, number: int) -> str | None:
        return self._channels[number].failure

    def close(self, number: int) -> None:
        self._channels.pop(number).close()


def _serve(connection: Connection, platforms: str) -> None:
    jax.config.update("jax_platforms", platforms)
    orders = _Orders()
    with contextlib.suppress(EOFError):
        while True:
            order, arguments = connection.recv()
            try:
                answer = True, getattr(orders, order)(*arguments)
            except Exception as error:
                answer = False, f"{type(error).__name__}: {error}"
            connection.send(answer)
