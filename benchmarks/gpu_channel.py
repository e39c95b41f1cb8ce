"""Round trips of a GPU's channels: cuda_host with a CPU process, cuda_ipc with a GPU process, and raw CUDA graphs.

A program of `--unroll` round trips, which XLA makes one CUDA graph, is run again and again; the other process echoes in
a compiled loop. Where there is a second GPU, cuda_ipc's other process takes it; else both share one and take turns,
unless CUDA's MPS runs, and the figure says how long a turn is rather than how long a message takes.

The raw rows replay a graph without XLA (raw_gpu_channel.cu) and give the time from the CPU's publishing store to the
kernel behind the recv, seen by the CPU.
"""

import dataclasses
import json
import multiprocessing
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from lamina_jax.transport import Channel, ChannelAddress, Tag, attach, channel_class, cuda, make_stamp, recv, send

_SIZES = flags.DEFINE_list("sizes", ["2048", "32768", "262144", "1048576"], "Bytes of one message.")
_KINDS = flags.DEFINE_list("kinds", ["cuda_host", "cuda_ipc"], "Kinds of channels to measure; none for raw rows only.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Measurements of each kind and size; the table has the median.")
_SECONDS = flags.DEFINE_float("seconds", 0.2, "Aim of one measurement, in seconds.")
_UNROLL = flags.DEFINE_integer("unroll", 20, "Round trips in one program.")
_RAW_ROUNDS = flags.DEFINE_integer("raw_rounds", 2000, "Replays of the raw graph.")
_JSON = flags.DEFINE_string("json", None, "Also write the rows to this file.")

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_LIMIT_S = 120.0


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. `publish_to_consumer_us` is None where it was not measured."""

    kind: str
    num_bytes: int
    rounds: int
    round_trip_us: float
    publish_to_consumer_us: float | None = None


def struct(num_bytes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((num_bytes // 4,), jnp.float32)


def make_ping(tx: Channel, rx: Channel, rounds: int):
    """`rounds` round trips without a loop, each adding 1. (int32[3], float32[n]) -> (int32[3], float32[n])"""

    def ping(stamp, x):
        for _ in range(rounds):
            stamp = send([tx], stamp, [x], tag=Tag.Q)
            (x,), stamp = recv([rx], stamp, [jax.ShapeDtypeStruct(x.shape, x.dtype)], tag=Tag.ATTENDED)
            x = x + 1.0
        return stamp, x

    return jax.jit(ping)


def make_pong(rx: Channel, tx: Channel, num_bytes: int, rounds: int):
    """The other side, in a loop."""

    def body(_, stamp):
        tensors, stamp = recv([rx], stamp, [struct(num_bytes)], tag=Tag.Q)
        return send([tx], stamp, tensors, tag=Tag.ATTENDED)

    return jax.jit(lambda stamp: jax.lax.fori_loop(0, rounds, body, stamp))


def raise_failure(*channels: Channel) -> None:
    for channel in channels:
        if error := channel.error():
            raise error


def serve(connection: Connection, platforms: str, device: int | None) -> None:
    """The other process: attaches, says so, and echoes as often as it is told."""
    jax.config.update("jax_platforms", platforms)
    while (order := connection.recv()) is not None:
        there, back, num_bytes, rounds = order
        options = {} if device is None else {"device": device}
        rx = attach(there, role="reader", peer="the benchmark", **options)
        tx = attach(back, role="writer", peer="the benchmark", **options)
        with rx, tx, jax.default_device(None if device is None else jax.devices()[device]):
            pong = make_pong(rx, tx, num_bytes, rounds).lower(make_stamp(0)).compile()
            connection.send("ready")
            jax.block_until_ready(pong(make_stamp(0)))
            raise_failure(rx, tx)
            connection.send("done")


class Other:
    """The other process."""

    def __init__(self, platforms: str, device: int | None):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, platforms, device), daemon=True)
        self._process.start()

    def echo(self, there: ChannelAddress, back: ChannelAddress, num_bytes: int, rounds: int) -> None:
        self._connection.send((there, back, num_bytes, rounds))
        self.expect("ready")

    def expect(self, answer: str) -> None:
        if not self._connection.poll(_LIMIT_S) or self._connection.recv() != answer:
            raise RuntimeError(f"the other process did not answer {answer!r} in {_LIMIT_S} s")

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def time_round_trip(kind: str, other: Other, num_bytes: int, runs: int) -> float:
    """Microseconds per round trip, over `runs` runs of the program; checks what came back at last."""
    create = channel_class(kind).create
    options = {"peer": "the echo", "messages": [], "slot_bytes": num_bytes, "num_slots": 4}
    with create(role="writer", **options) as tx, create(role="reader", **options) as rx:
        unroll = _UNROLL.value
        warm_up = 3  # XLA captures the graph in one of them
        rounds = unroll * (runs + warm_up)
        other.echo(tx.address, rx.address, num_bytes, rounds)
        ping = make_ping(tx, rx, unroll)
        stamp, x = make_stamp(0), jnp.arange(num_bytes // 4, dtype=jnp.float32) % 1024
        first = np.asarray(x)
        for _ in range(warm_up):
            stamp, x = ping(stamp, x)
        jax.block_until_ready(x)
        start = time.perf_counter()
        for _ in range(runs):
            stamp, x = ping(stamp, x)
        jax.block_until_ready(x)
        took = time.perf_counter() - start
        raise_failure(tx, rx)
        other.expect("done")
        np.testing.assert_array_equal(np.asarray(x), first + rounds)
    return took / (unroll * runs) * 1e6


def measure(kind: str, other: Other, num_bytes: int) -> Row:
    once = time_round_trip(kind, other, num_bytes, 1) * _UNROLL.value * 1e-6
    runs = max(1, min(1000, round(_SECONDS.value / once)))
    took = [time_round_trip(kind, other, num_bytes, runs) for _ in range(_REPEATS.value)]
    return Row(kind, num_bytes, runs * _UNROLL.value, statistics.median(took))


def measure_kind(kind: str) -> Iterator[Row]:
    second = 1 if cuda.cuda_device_count() > 1 else 0
    other = Other("cpu", None) if kind == "cuda_host" else Other("cuda,cpu", second)
    try:
        for size in _SIZES.value:
            yield measure(kind, other, int(size))
    finally:
        other.end()


def build_raw(folder: str) -> str:
    calls = _ROOT / "custom_calls"
    sources = [_ROOT / "benchmarks" / "raw_gpu_channel.cu", calls / "cuda" / "kernels.cu"]
    sources += [
        calls / "cuda" / "device_end.cc",
        calls / "channel_end.cc",
        calls / "shm_channel.cc",
        calls / "wording.cc",
    ]
    flags = ["-std=c++17", "--expt-relaxed-constexpr", "-O2", "-arch=sm_90", "-cudart=static"]
    flags += [f"-I{calls}", f"-I{calls / 'cuda'}", "-lpthread", "-ldl", "-lrt"]
    program = os.path.join(folder, "raw_gpu_channel")
    subprocess.run(["nvcc", *flags, *map(str, sources), "-o", program], check=True, timeout=300)
    return program


def measure_raw() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        program = build_raw(folder)
        for size in _SIZES.value:
            command = [program, size, str(_RAW_ROUNDS.value)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=_LIMIT_S)
            got = json.loads(done.stdout)
            yield Row("raw graph", got["bytes"], got["rounds"], got["round_trip_us"], got["publish_to_consumer_us"])


def main(argv: list[str]) -> None:
    del argv
    if cuda.cuda_device_count() == 0:
        sys.exit("gpu_channel.py needs a GPU and an installation that was built with nvcc")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax.config.update("jax_platforms", "cuda,cpu")
    print(f"{'kind':<12}{'bytes':>10}{'round trips':>14}{'us each':>12}{'GB/s':>9}{'publish to consumer, us':>26}")
    rows = []
    for row in (row for rows in (*map(measure_kind, _KINDS.value), measure_raw()) for row in rows):
        gigabytes = 2 * row.num_bytes / row.round_trip_us / 1e3
        latency = "" if row.publish_to_consumer_us is None else f"{row.publish_to_consumer_us:.2f}"
        line = f"{row.kind:<12}{row.num_bytes:>10}{row.rounds:>14}{row.round_trip_us:>12.2f}{gigabytes:>9.2f}"
        print(f"{line}{latency:>26}", flush=True)
        rows.append(row)
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
