"""A channel between two processes of this machine, without XLA and inside jitted programs.

Half a round trip of ping-pong, as ib_write_lat counts it, and messages of 1 MB one way, as ib_write_bw does. "native"
is C++ alone, which leaves what lies in the ring as it is, like perftest (so over shm no byte moves); "copied" copies
messages into the ring and out of it, as custom calls do; "jitted" is a program of XLA. There is a ring each way for
ping-pong and one for 1 MB, each with slots for the largest of its messages. All sizes take turns, several times, with
perftest if that is asked for, and what is shown are medians of the turns (in which a latency is a median itself), as
what else the cores do comes and goes; programs of XLA run once, at the end. The last line is JSON with the figures of
each turn, for whoever compares.
"""

import collections
import dataclasses
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import jax
from absl import app, flags
from ping_pong import make_drain, make_fill, make_ping, make_pong, message, spec

from lamina_jax import _custom_calls
from lamina_jax.testing.rdma.perftest import write_bandwidth, write_latency
from lamina_jax.transport import Channel, MessageSpec, Tag, attach, channel_class
from lamina_jax.transport.rdma_devices import choose_verbs_port

_KIND = flags.DEFINE_enum("kind", "verbs", ["shm", "tcp", "verbs"], "The kind of channel.")
_SIZES = flags.DEFINE_list("sizes", ["2", "2048", "32768"], "Bytes of a message in ping-pong, even numbers.")
_TURNS = flags.DEFINE_integer("turns", 5, "How often sizes are measured one after the other.", lower_bound=1)
_PERFTEST = flags.DEFINE_string(
    "perftest",
    None,
    "An RDMA device, e.g. mlx5_0: the channel's, over which ib_write_lat and ib_write_bw join the turns.",
)
_ROUNDS = flags.DEFINE_integer("rounds", 400, "Round trips of a turn, a tenth above 4 KiB.", lower_bound=50)
_JITTED_ROUNDS = flags.DEFINE_integer("jitted_rounds", 200, "Round trips of a jitted program; 0 for none.")
_MESSAGES = flags.DEFINE_integer("messages", 20, "Messages one way of a turn.", lower_bound=5)
_SPIN_US = flags.DEFINE_float("spin_us", None, "How long a wait polls before it sleeps; the kind's own if not given.")

_LARGE = 1 << 20
# A reader gives slots back by a message of its own, once for three quarters of a ring; perftest has none to give back.
_SMALL_SLOTS = 32
_TIMEOUT_S = 60.0
_THERE = "the process at the other end of the channels"


def _waits() -> dict[str, float]:
    spin = {} if _SPIN_US.value is None else {"spin_us": _SPIN_US.value}
    return {"timeout_s": _TIMEOUT_S, **spin}


@dataclasses.dataclass(frozen=True)
class _Game:
    """What both processes play in a turn: all sizes, then a stream; first without copies, then with them."""

    sizes: list[int]
    turns: int
    rounds: int
    messages: int

    def play(self, tx: Channel, rx: Channel, large: Channel, *, first: bool) -> Iterator[tuple[bool, int, float]]:
        """Whether messages were copied, their size, and the median of half a round trip in nanoseconds; and those of
        the stream through `large`, as of size `_LARGE`.
        """
        for copies in (False, True):
            for size in self.sizes:
                count = _rounds(size, self.rounds)
                rounds = _custom_calls.ping_pong(tx.id, rx.id, size, count, first=first, copies=copies)
                yield copies, size, statistics.median(rounds[count // 10 :]) / 2
            yield copies, _LARGE, _custom_calls.stream(large.id, _LARGE, self.messages, copies)


def _rounds(size: int, rounds: int) -> int:
    return rounds if size <= 4096 else rounds // 10


def _play_there(connection: Connection, game: _Game, jitted_rounds: int, waits: dict[str, float]) -> None:
    jax.config.update("jax_platforms", "cpu")
    there, back, wide = connection.recv()
    with (
        attach(there, role="reader", peer="benchmark", **waits) as rx,
        attach(back, role="writer", peer="benchmark", **waits) as tx,
        attach(wide, role="reader", peer="benchmark", **waits) as large,
    ):
        connection.send([end.answer for end in (rx, tx, large)])
        for _ in range(game.turns):
            connection.recv()
            connection.send([figure for figure in game.play(tx, rx, large, first=False) if figure[1] == _LARGE])
        if jitted_rounds:
            for size in game.sizes:
                pong = make_pong(rx, tx, size, jitted_rounds).lower().compile()
                connection.send("ready")
                pong().block_until_ready()
                pong().block_until_ready()
            _drain(connection, large, game.messages)
        connection.recv()


def _drain(connection: Connection, large: Channel, count: int) -> None:
    """Tells in how many seconds a program receives the second half of the stream that `_fill` sends."""
    drain = make_drain(large, _LARGE, count).lower().compile()
    connection.send("ready")
    jax.block_until_ready(drain())
    start = time.perf_counter()
    jax.block_until_ready(drain())
    connection.send(time.perf_counter() - start)


def _figures(found: list[tuple[bool, int, float]], messages: int, *, copies: bool) -> dict[str, Any]:
    """Of each turn: microseconds one way by size, and MiB/s."""
    turns = collections.defaultdict(list)
    for copied, size, nanoseconds in found:
        if copied == copies:
            turns[size].append(nanoseconds)
    mib_per_s = [(messages - 1) * (_LARGE >> 20) / (ns / 1e9) for ns in turns.pop(_LARGE)]
    return {"us": {size: [ns / 1e3 for ns in some] for size, some in turns.items()}, "mib_per_s": mib_per_s}


class _Perftest:
    """Turns of perftest, and their figures, like those of `_figures`."""

    def __init__(self, device: str):
        port = choose_verbs_port(device)
        self._over: dict[str, Any] = {"device": port.nic, "gid_index": port.gid_index}
        self.figures: dict[str, Any] = {"us": collections.defaultdict(list), "mib_per_s": []}

    def play(self, sizes: list[int], rounds: int, messages: int, *, streams: bool) -> None:
        """A turn; to start ib_write_bw takes longer than all else, so not every turn has one."""
        for size in sizes:
            latency_us = write_latency(nbytes=size, iterations=_rounds(size, rounds), **self._over)
            self.figures["us"][size].append(latency_us)
        if not streams:
            return
        self.figures["mib_per_s"].append(write_bandwidth(nbytes=_LARGE, iterations=messages, **self._over))


class _Peer:
    """The other process, and what it says."""

    def __init__(self, *arguments: Any):
        self._connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_play_there, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def tell(self, what: Any) -> None:
        """Raises ConnectionError if it has ended."""
        try:
            self._connection.send(what)
        except OSError as error:
            raise self._lost() from error

    def hear(self) -> Any:
        """What it says next. Raises ConnectionError if it does not within `_TIMEOUT_S`, or has ended."""
        try:
            if self._connection.poll(_TIMEOUT_S):
                return self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._lost() from error
        raise ConnectionError(f"{_THERE} has said nothing for {_TIMEOUT_S:.0f} s")

    def end(self) -> None:
        """Raises ConnectionError if it does not end well within `_TIMEOUT_S`."""
        self.tell("done")
        self._process.join(_TIMEOUT_S)
        if self._process.exitcode != 0:
            raise self._lost()

    def _lost(self) -> ConnectionError:
        self._process.join(_TIMEOUT_S)
        return ConnectionError(f"{_THERE} has ended with status {self._process.exitcode}")


def _jitted(tx: Channel, rx: Channel, size: int, peer: _Peer) -> float:
    """Microseconds one way in a program."""
    x = message(size)
    ping = make_ping(tx, rx, _JITTED_ROUNDS.value).lower(x).compile()
    peer.hear()
    x = ping(x).block_until_ready()
    start = time.perf_counter()
    ping(x).block_until_ready()
    return (time.perf_counter() - start) / _JITTED_ROUNDS.value / 2 * 1e6


def _fill(large: Channel, count: int, peer: _Peer) -> float:
    """MiB/s of a stream from program to program."""
    x = message(_LARGE)
    fill = make_fill(large, count).lower(x).compile()
    peer.hear()
    for _ in range(2):
        fill(x).block_until_ready()
    return count * (_LARGE >> 20) / peer.hear()


def _message(num_bytes: int) -> MessageSpec:
    return MessageSpec(Tag.Q, (spec(num_bytes),))


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    jax.config.update("jax_platforms", "cpu")
    sizes = [int(size) for size in _SIZES.value]
    if max(sizes) >= _LARGE:
        raise app.UsageError(f"--sizes must be below {_LARGE}, which is streamed; got {max(sizes)}")
    if any(size % 2 for size in sizes):
        raise app.UsageError(f"--sizes must be even, as messages are of float16; got {_SIZES.value}")
    if _PERFTEST.value is not None:
        os.environ["LAMINA_RDMA_DEVICE"] = _PERFTEST.value
    game = _Game(sizes=sizes, turns=_TURNS.value, rounds=_ROUNDS.value, messages=_MESSAGES.value)
    peer = _Peer(game, _JITTED_ROUNDS.value, _waits())
    perftest = None if _PERFTEST.value is None else _Perftest(_PERFTEST.value)
    kind = channel_class(_KIND.value)
    small: dict[str, Any] = {"peer": "echo", "messages": [_message(max(sizes))], "num_slots": _SMALL_SLOTS, **_waits()}
    wide: dict[str, Any] = {"peer": "echo", "messages": [_message(_LARGE)], **_waits()}
    with (
        kind.create(role="writer", **small) as tx,
        kind.create(role="reader", **small) as rx,
        kind.create(role="writer", **wide) as large,
    ):
        ends = (tx, rx, large)
        peer.tell([end.address for end in ends])
        for end, answer in zip(ends, peer.hear(), strict=True):
            end.connect(answer)
        found = []
        for turn in range(game.turns):
            if perftest is not None:
                perftest.play(sizes, game.rounds, game.messages, streams=turn % 2 == 0)
            peer.tell("turn")
            found += [figure for figure in game.play(tx, rx, large, first=True) if figure[1] != _LARGE]
            found += peer.hear()  # the reader knows when the last message of a stream was there
        jitted: dict[str, Any] = {"us": {}, "mib_per_s": None}
        if _JITTED_ROUNDS.value:
            jitted["us"] = {size: _jitted(tx, rx, size, peer) for size in sizes}
            jitted["mib_per_s"] = _fill(large, game.messages, peer)
        peer.end()
    native, copied = (_figures(found, game.messages, copies=copies) for copies in (False, True))
    _show(native, copied, jitted, perftest and perftest.figures)


def _show(
    native: dict[str, Any], copied: dict[str, Any], jitted: dict[str, Any], perftest: dict[str, Any] | None
) -> None:
    for size, turns in native["us"].items():
        theirs = perftest["us"][size] if perftest else None
        print(f"{size:8d} bytes: {_line('us', turns, theirs, copied['us'][size], jitted['us'].get(size))}")
    theirs = perftest["mib_per_s"] if perftest else None
    print(f"{_LARGE:8d} bytes: {_line('MiB/s', native['mib_per_s'], theirs, copied['mib_per_s'], jitted['mib_per_s'])}")
    print(json.dumps({"native": native, "copied": copied, "jitted": jitted, "perftest": perftest}))


def _line(
    unit: str, native: list[float], perftest: list[float] | None, copied: list[float], jitted: float | None
) -> str:
    ratio = f" ({statistics.median(native) / statistics.median(perftest):.2f}x of perftest)" if perftest else ""
    in_program = "" if jitted is None else f", {jitted:8.2f} jitted"
    return f"{statistics.median(native):8.2f} {unit} native{ratio}, {statistics.median(copied):8.2f} copied{in_program}"


if __name__ == "__main__":
    app.run(main)
