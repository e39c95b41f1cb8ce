"""A channel between two processes of this machine, without XLA and inside jitted programs.

Half a round trip of ping-pong, as ib_write_lat counts it, and messages of 1 MB one way, as ib_write_bw does. The last
line is JSON, for whoever compares.
"""

import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection

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
        for size in sizes:
            _custom_calls.ping_pong(tx.id, rx.id, size, rounds, False)
        connection.send(_custom_calls.stream(rx.id, _LARGE, messages))
        for size in jitted_sizes:
            pong = make_pong(rx, tx, size, jitted_rounds).lower().compile()
            connection.send("ready")
            pong().block_until_ready()
            pong().block_until_ready()
        connection.recv()


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
        native = {}
        for size in sizes:
            rounds = _custom_calls.ping_pong(tx.id, rx.id, size, _ROUNDS.value, True)
            native[size] = statistics.median(rounds[_ROUNDS.value // 10 :]) / 2e3
        _custom_calls.stream(tx.id, _LARGE, _MESSAGES.value)
        bandwidth = (_MESSAGES.value - 1) * 1e9 / mine.recv()  # MiB/s
        jitted = {size: _jitted(tx, rx, size, mine) for size in _programs(sizes)}
        mine.send("done")
        peer.join(_TIMEOUT_S)
    for size in sizes:
        print(
            f"{size:8d} bytes: {native[size]:8.2f} us native, {jitted.get(size, float('nan')):8.2f} us jitted, one way"
        )
    print(f"{_LARGE:8d} bytes: {bandwidth:8.1f} MiB/s native")
    print(json.dumps({"native_us": native, "jitted_us": jitted, "mib_per_s": bandwidth}))


if __name__ == "__main__":
    app.run(main)
