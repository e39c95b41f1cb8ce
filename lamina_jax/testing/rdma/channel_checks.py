"""Checks of channels over RDMA: beside perftest on the same device, and what they do when something breaks."""

import contextlib
import functools
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Final

from lamina_jax.testing.rdma.machines import LOOPBACK_DEVICE, ROOT, Job, JobError, Machine
from lamina_jax.testing.rdma.programs import run_here
from lamina_jax.testing.rdma.report import Row, failed, judged

_LATENCY_NBYTES: Final = (2, 2048, 32768)
_STREAM: Final = "stream"
_SIZES: Final = (*map(str, _LATENCY_NBYTES), _STREAM)
_Figures = Mapping[str, Mapping[str, list[float]]]
"""By how a channel is used, or perftest, and by size, the figures of turns."""
_BANDWIDTH_NBYTES: Final = 1 << 20
KILL_SEEDS: Final = int(os.environ.get("LAMINA_KILL_SEEDS", "1"))
"""How many seeds choose when peers and workers are killed."""
_ALL_CONFORMANCE: Final = os.environ.get("LAMINA_CONFORMANCE") == "all"
CHANNELS_LIMIT_S: Final = 400.0 + 80.0 * KILL_SEEDS + 1500.0 * _ALL_CONFORMANCE
"""How long the tests of channels may take in a machine."""

_CONFORMANCE: Final = "tests/transport/test_channel.py"
_FAULTS: Final = "tests/transport/test_verbs.py"
_CONFORMANCE_TESTS: Final = (
    "every-dtype",
    "test_round_trips_in_a_scan",
    "test_full_ring_is_a_deadline_error",
    "test_peer_ends_our_wait",
)
"""Not all, as JAX is 20 times slower in a machine, and none that starts a process of its own. `make test` runs all over
the kinds that need no RDMA device."""
_NOT_IN_MACHINES: Final = ("any_traffic", "killed_while", "know_each_other")
"""One compiles for each of many examples; the others compare process numbers, and `python` there is a client of the
process that runs the program."""
_PYTEST: Final = (
    *(sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers"),
    *("-p", "pytest_timeout", "--durations=12", "-k"),
)
"""Runs tests without checking types. What it compiles of them here (`prepare_channels`) spares machines that work."""
_NO_PLUGINS: Final = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
"""Importing those that are installed takes longer than most tests."""

_CHANNEL: Final = (
    *(sys.executable, "benchmarks/channel_native.py"),
    f"--sizes={','.join(map(str, _LATENCY_NBYTES))}",
)
_MORE_TURNS_S: Final = 100.0
"""How long turns are added while medians are out of bounds: the host's other work moves those of five by a quarter."""
_TURNS: Final = 5
_ROUNDS: Final = 2000
"""Of a turn. The speed of the host changes by a factor of two within tens of milliseconds, so few tell nothing."""
_SPIN_US: Final = 10000
"""Longer than a wait lasts here: perftest never sleeps either."""
_MOST_LATENCY: Final = 1.3
_LEAST_BANDWIDTH: Final = 0.8
"""Of perftest's."""
_KINDS_HERE: Final = ("shm", "tcp")
"""They work without an RDMA device, so are tested on this host, which is faster."""
_ON_LOOPBACK: Final = {"LAMINA_RDMA_DEVICE": LOOPBACK_DEVICE}


def prepare_beside_perftest(folder: Path) -> None:
    """Compiles the programs of the benchmark."""
    few = ["--turns=1", "--rounds=50"]
    run_here([*_CHANNEL, "--kind=shm", *few], folder=folder, cwd=ROOT, timeout_s=120.0)


def beside_perftest(machines: tuple[Machine, ...]) -> Iterator[Row]:
    """A channel's ping-pong and bandwidth beside ib_write_lat and ib_write_bw, in turn on one device, by medians."""
    start = time.monotonic()
    figures = _measure(machines[0])
    while not all(_is_good(figures, size) for size in _SIZES) and time.monotonic() - start < _MORE_TURNS_S:
        more = _measure(machines[0])
        figures = {how: {size: figures[how][size] + more[how][size] for size in _SIZES} for how in figures}
    for size in _SIZES:
        unit, peer = ("MiB/s", "ib_write_bw") if size == _STREAM else ("us", "ib_write_lat")
        native, theirs = figures["native"][size], figures["perftest"][size]
        yield judged(
            f"verbs {_BANDWIDTH_NBYTES >> 20} MB messages" if size == _STREAM else f"verbs {size} B, one way",
            _is_good(figures, size),
            f"{_spread(native)}, {_ratio(figures, size):.2f}x of {peer}'s {_spread(theirs)} {unit}; copied "
            f"{median(figures['copied'][size]):.1f}, through XLA {median(figures['jitted'][size]):.1f}; "
            f"{len(native)} turns",
        )


def _measure(machine: Machine) -> _Figures:
    length = [f"--turns={_TURNS}", f"--rounds={_ROUNDS}", f"--spin_us={_SPIN_US}"]
    command = [*_CHANNEL, "--kind=verbs", f"--perftest={LOOPBACK_DEVICE}", *length]
    output = machine.run(command, env=_ON_LOOPBACK, timeout_s=240, name="channel")
    said = json.loads(output.strip().splitlines()[-1])
    jitted = {size: [us] for size, us in said["jitted"]["us"].items()} | {_STREAM: [said["jitted"]["mib_per_s"]]}
    turns = {how: said[how]["us"] | {_STREAM: said[how]["mib_per_s"]} for how in ("native", "copied", "perftest")}
    return turns | {"jitted": jitted}


def _is_good(figures: _Figures, size: str) -> bool:
    ratio = _ratio(figures, size)
    return ratio >= _LEAST_BANDWIDTH if size == _STREAM else ratio <= _MOST_LATENCY


def _ratio(figures: _Figures, size: str) -> float:
    return median(figures["native"][size]) / median(figures["perftest"][size])


def _spread(figures: list[float]) -> str:
    return f"{median(figures):.1f} ({min(figures):.0f}-{max(figures):.0f})"


def prepare_channels(folder: Path) -> None:
    """Runs the conformance tests of the kinds that need no RDMA; reads the others, which compiles them to bytecode."""
    _conformance_here(folder)


def start_channels(machine: Machine) -> Job:
    """Starts the conformance tests of channels over RDMA, and the tests of what may break in those."""
    some = f"not ({' or '.join(_NOT_IN_MACHINES)})" if _ALL_CONFORMANCE else f"({' or '.join(_CONFORMANCE_TESTS)})"
    chosen = f"test_verbs or verbs and {some}"
    env = _ON_LOOPBACK | _NO_PLUGINS | {"LAMINA_KILL_SEEDS": str(KILL_SEEDS)}
    return machine.start([*_PYTEST, chosen, _CONFORMANCE, _FAULTS], env=env, name="channels")


def channels_here(folder: Path) -> Iterator[Row]:
    """What the conformance tests of the kinds that need no RDMA find on this host."""
    output = _conformance_here(folder)
    yield from (_conformance(kind, output, "on this host") for kind in _KINDS_HERE)


def channels(job: Job) -> Iterator[Row]:
    """What the tests that `start_channels` has started find."""
    with contextlib.suppress(JobError):  # killed when its time is up: what it found until then counts
        job.wait(timeout_s=CHANNELS_LIMIT_S)
    yield _conformance("verbs", job.output, "in a machine")
    for test, outcome in re.findall(r"^\S+test_verbs\S+::test_(\S+) (PASSED|FAILED|ERROR)", job.output, re.MULTILINE):
        yield judged(f"verbs: {test.replace('_', ' ')}", outcome == "PASSED", "")
    if job.status != 0:
        last = job.output.strip().rpartition("\n")[2]
        yield failed(job.name, f"pytest ended with status {job.status} after {job.seconds:.0f} s: {last}")


@functools.cache
def _conformance_here(folder: Path) -> str:
    chosen = f"({' or '.join(_KINDS_HERE)}) and ({' or '.join(_CONFORMANCE_TESTS)})"
    command = [*_PYTEST, chosen, _CONFORMANCE, _FAULTS]
    return run_here(command, env=_NO_PLUGINS, folder=folder, cwd=ROOT, timeout_s=300.0, may_fail=True)


def _conformance(kind: str, output: str, where: str) -> Row:
    outcomes = re.findall(rf"^\S+test_channel\S+::(\w+)\[\S*\b{kind}\b\S*\] (\w+)", output, re.MULTILINE)
    wrong = [test for test, outcome in outcomes if outcome != "PASSED"]
    detail = f"{len(outcomes) - len(wrong)} of {len(outcomes)} tests passed; {', '.join(wrong)}".rstrip("; ")
    return judged(f"conformance of {kind}, {where}", bool(outcomes) and not wrong, detail)
