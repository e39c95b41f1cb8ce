"""A channel between two processes of this machine, without XLA and inside jitted programs.

Half a round trip of ping-pong, as ib_write_lat counts it, and messages of 1 MB one way, as ib_write_bw does. "native"
is C++ alone, which leaves what lies in the ring as it is, like perftest (so over shm no byte moves); "copied" copies
messages into the ring and out of it, as custom calls do; "jitted" is a program of XLA. The last line is JSON, for
whoever compares.
"""

import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from ping_pong import make_ping, make_pong

from lamina_jax import _custom_calls
from lamina_jax.transport import Channel, MessageSpec, Tag, attach, channel_class

_KIND = flags.DEFINE_enum("kind", "verbs", ["shm", "tcp", "verbs"], "The kind of channel.")
_SIZES = flags.DEFINE_list("sizes", ["2", "2048", "32768"], "Bytes of a message in ping-pong.")
_ROUNDS = flags.DEFINE_integer("rounds", 1000, "Round trips without XLA.", lower_bound=20)
_JITTED_ROUNDS = flags.DEFINE_integer("jitted_rounds", 200, "Round trips in a jitted program; 0 for none.")
_MESSAGES = flags.DEFINE_integer("messages", 50, "Messages one way.", lower_bound=2)
_SPIN_US = flags.DEFINE_float("spin_us", None, "How long a wait polls before it sleeps; the kind's own if not given.")

_LARGE = 1 << 20
_TIMEOUT_S = 60.0


def _programs(sizes: list[int]) -> list[int]:
    """Sizes that jitted programs send: they have whole floats."""
    return [size for size in sizes if size % 4 == 0] if _JITTED_ROUNDS.value else []


def _waits() -> dict[str, float]:
    spin = {} if _SPIN_US.value is None else {"spin_us": _SPIN_US.value}
    return {"timeout_s": _TIMEOUT_S, **spin}


def _peer(
    connection: Connection,
    sizes: list[int],
    rounds: int,
    jitted_sizes: list[int],
    jitted_rounds: int,
    messages: int,
    waits: dict[str, float],
) -> None:
    jax.config.update("jax_platforms", "cpu")
    there, back = connection.recv()
    with (
        attach(there, role="reader", peer="benchmark", **waits) as rx,
        attach(back, role="writer", peer="benchmark", **waits) as tx,
    ):
        connection.send((rx.answer, tx.answer))
        connection.recv()
        for copies in (False, True):
            for size in sizes:
                _custom_calls.ping_pong(tx.id, rx.id, size, rounds, first=False, copies=copies)
            connection.send(_custom_calls.stream(rx.id, _LARGE, messages, copies))
        for size in jitted_sizes:
            pong = make_pong(rx, tx, size, jitted_rounds).lower().compile()
            connection.send("ready")
            pong().block_until_ready()
            pong().block_until_ready()
        connection.recv()


def _native(tx: Channel, rx: Channel, sizes: list[int], copies: bool, connection: Connection) -> dict[str, Any]:
    """Microseconds one way by size, and MiB/s."""
    count = _ROUNDS.value
    latency = {}
    for size in sizes:
        rounds = _custom_calls.ping_pong(tx.id, rx.id, size, count, first=True, copies=copies)
        latency[size] = statistics.median(rounds[count // 10 :]) / 2e3
    _custom_calls.stream(tx.id, _LARGE, _MESSAGES.value, copies)
    return {"us": latency, "mib_per_s": (_MESSAGES.value - 1) * 1e9 / connection.recv()}


def _jitted(tx: Channel, rx: Channel, size: int, connection: Connection) -> float:
    x = jnp.ones(size // 4, jnp.float32)
    ping = make_ping(tx, rx, _JITTED_ROUNDS.value).lower(x).compile()
    connection.recv()
    x = ping(x).block_until_ready()
    start = time.perf_counter()
    ping(x).block_until_ready()
    return (time.perf_counter() - start) / _JITTED_ROUNDS.value / 2 * 1e6


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    jax.config.update("jax_platforms", "cpu")
    sizes = [int(size) for size in _SIZES.value]
    mine, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    arguments = (theirs, sizes, _ROUNDS.value, _programs(sizes), _JITTED_ROUNDS.value, _MESSAGES.value, _waits())
    peer = context.Process(target=_peer, args=arguments, daemon=True)
    peer.start()
    large = MessageSpec(Tag.Q, (jax.ShapeDtypeStruct((_LARGE // 4,), jnp.float32),))
    ends = {"peer": "echo", "messages": [large], **_waits()}
    kind = channel_class(_KIND.value)
    with kind.create(role="writer", **ends) as tx, kind.create(role="reader", **ends) as rx:
        mine.send((tx.address, rx.address))
        for channel, answer in zip((tx, rx), mine.recv(), strict=True):
            channel.connect(answer)
        mine.send("go")
        native, copied = (_native(tx, rx, sizes, copies, mine) for copies in (False, True))
        jitted = {size: _jitted(tx, rx, size, mine) for size in _programs(sizes)}
        mine.send("done")
        peer.join(_TIMEOUT_S)
    for size in sizes:
        in_program = f", {jitted[size]:8.2f} us jitted" if size in jitted else ""
        print(f"{size:8d} bytes: {native['us'][size]:8.2f} us native, {copied['us'][size]:8.2f} us copied{in_program}")
    print(f"{_LARGE:8d} bytes: {native['mib_per_s']:8.1f} MiB/s native, {copied['mib_per_s']:8.1f} MiB/s copied")
    print(json.dumps({"native": native, "copied": copied, "jitted_us": jitted}))


if __name__ == "__main__":
    app.run(main)
