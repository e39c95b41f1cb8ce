"""Round trips through a pair of channels inside one jitted program, against a raw C++ ping-pong.

Both sides run one compiled loop; this one sends and receives, the peer receives and sends back. The raw floor moves the
same bytes through rings of the same layout, or with --kind=tcp through a connection of this host. The two alternate, so
that a busy moment of the machine hits both, and each side has a core to itself.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import msgspec
from absl import app, flags
from ping_pong import make_ping, make_pong, message, spec

from lamina_jax.transport import ChannelAddress, MessageSpec, Tag, attach, channel_class

_KIND = flags.DEFINE_enum("kind", "shm", ["shm", "tcp"], "The kind of channel.")
_SIZES = flags.DEFINE_list("sizes", ["2048", "32768", "262144", "1048576"], "Bytes of one message.")
_REPEATS = flags.DEFINE_integer("repeats", 15, "Measurements of each kind, interleaved.")
_SECONDS = flags.DEFINE_float("seconds", 0.05, "Aim of one measurement, in seconds.")
_NUM_SLOTS = flags.DEFINE_integer("num_slots", 4, "Slots of every ring.")
_SPIN_US = flags.DEFINE_float("spin_us", None, "How long a wait polls before it sleeps; None for the default.")
_JSON = flags.DEFINE_string("json", None, "Also write the numbers to this file.")
_PEER = flags.DEFINE_bool("peer", False, "Used by the benchmark itself: be the other side.")

_EXPECTED_US = {
    "shm": {2048: 1.0, 32768: 3.0, 262144: 15.0, 1048576: 60.0},
    "tcp": {2048: 40.0, 32768: 60.0, 262144: 250.0, 1048576: 1000.0},
}
_RAW = {"shm": "raw_ping_pong", "tcp": "raw_tcp_ping_pong"}
_ALLOWED = os.sched_getaffinity(0)
_HERE = pathlib.Path(__file__).resolve().parent


class Order(msgspec.Struct):
    """What the peer is told to do: echo `rounds` messages of `num_bytes`."""

    there: ChannelAddress
    back: ChannelAddress
    num_bytes: int
    rounds: int
    runs: int
    core: int


class Answers(msgspec.Struct):
    """What the peer's ends have to say to those here."""

    there: ChannelAddress | None
    back: ChannelAddress | None


def cores() -> tuple[int, int]:
    """A core for each side."""
    allowed = sorted(_ALLOWED)
    return allowed[0], allowed[-1]


def pin(core: int) -> None:
    """Keeps every thread of this process, and those to come, on one core."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), [core])


def spin() -> dict[str, float]:
    return {} if _SPIN_US.value is None else {"spin_us": _SPIN_US.value}


def run_peer() -> None:
    for line in sys.stdin:
        order = msgspec.json.decode(line, type=Order)
        pin(order.core)
        with (
            attach(order.there, role="reader", peer="benchmark", **spin()) as rx,
            attach(order.back, role="writer", peer="benchmark", **spin()) as tx,
        ):
            print(msgspec.json.encode(Answers(rx.answer, tx.answer)).decode(), flush=True)
            pong = make_pong(rx, tx, order.num_bytes, order.rounds).lower().compile()
            for _ in range(order.runs):
                print("ready", flush=True)
                pong().block_until_ready()
            sys.stdin.readline()  # keep the channels until the other side has read the last message


def build_raw(folder: str) -> str:
    program = f"{folder}/raw"
    source = _HERE / f"{_RAW[_KIND.value]}.cc"
    include = _HERE.parent / "custom_calls"
    subprocess.run(["g++", "-std=c++17", "-O3", f"-I{include}", str(source), "-o", program], check=True)
    return program


def measure_raw(program: str, num_bytes: int, rounds: int) -> float:
    arguments = [program, str(num_bytes), str(_NUM_SLOTS.value), str(rounds), *(str(core) for core in cores())]
    return float(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout) / 1e3


def measure(peer: subprocess.Popen, raw_program: str, num_bytes: int) -> dict[str, list[float]]:
    """Microseconds per round trip, `repeats` times each way."""
    assert peer.stdin is not None
    assert peer.stdout is not None
    rounds = max(20, int(_SECONDS.value * 1e6 / _EXPECTED_US[_KIND.value].get(num_bytes, num_bytes / 2e4)))
    messages = [MessageSpec(Tag.Q, (spec(num_bytes),)), MessageSpec(Tag.ATTENDED, (spec(num_bytes),))]
    ends = {"peer": "echo", "messages": messages, "num_slots": _NUM_SLOTS.value, **spin()}
    jitted, raw = [], []
    kind = channel_class(_KIND.value)
    with kind.create(role="writer", **ends) as tx, kind.create(role="reader", **ends) as rx:
        order = Order(tx.address, rx.address, num_bytes, rounds, _REPEATS.value + 1, cores()[1])
        print(msgspec.json.encode(order).decode(), file=peer.stdin, flush=True)
        answers = msgspec.json.decode(peer.stdout.readline(), type=Answers)
        tx.connect(answers.there)
        rx.connect(answers.back)
        x = message(num_bytes)
        ping = make_ping(tx, rx, rounds).lower(x).compile()
        for _ in range(_REPEATS.value + 1):
            peer.stdout.readline()
            start = time.perf_counter()
            x = ping(x).block_until_ready()
            jitted.append((time.perf_counter() - start) / rounds * 1e6)
            raw.append(measure_raw(raw_program, num_bytes, rounds))
        print(file=peer.stdin, flush=True)
    return {"jitted_us": jitted[1:], "raw_us": raw[1:]}  # the first pays for page faults


def spread(values: list[float]) -> str:
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:9.2f} [{low:8.2f}, {high:8.2f}]"


def report(results: dict[int, dict[str, list[float]]]) -> None:
    print(f"{'bytes':>8}  {'jitted us: median [quartiles]':>30}  {'raw us: median [quartiles]':>30}   more us  ratio")
    for num_bytes, result in results.items():
        jitted, raw = (statistics.median(result[key]) for key in ("jitted_us", "raw_us"))
        print(
            f"{num_bytes:8d}  {spread(result['jitted_us']):>30}  {spread(result['raw_us']):>30}  "
            f"{jitted - raw:8.2f}  {jitted / raw:5.2f}"
        )


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    jax.config.update("jax_platforms", "cpu")
    if _PEER.value:
        run_peer()
        return
    pin(cores()[0])
    command = [sys.executable, __file__, "--peer", *([] if _SPIN_US.value is None else [f"--spin_us={_SPIN_US.value}"])]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer,
    ):
        try:
            raw_program = build_raw(folder)
            results = {int(size): measure(peer, raw_program, int(size)) for size in _SIZES.value}
        except BaseException:
            peer.kill()
            raise
    report(results)
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
