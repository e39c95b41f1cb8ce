"""Checks of channels over RDMA: beside perftest on the same device, and what they do when something breaks."""

import contextlib
import functools
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Final

from lamina_jax.testing.rdma.machines import LOOPBACK_DEVICE, ROOT, Job, JobError, Machine
from lamina_jax.testing.rdma.programs import run_here
from lamina_jax.testing.rdma.report import Row, failed, judged

_LATENCY_NBYTES: Final = (2, 2048, 32768)
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
_TURNS: Final = 5
_ROUNDS: Final = 2000
"""Of a turn. The speed of the host changes by a factor of two within tens of milliseconds, so few tell nothing."""
_SPIN_US: Final = 10000
"""Longer than a wait lasts here: perftest never sleeps either."""
_JUDGED_NBYTES: Final = "2"
_MOST_LATENCY: Final = 1.3
_LEAST_BANDWIDTH: Final = 0.8
"""Of perftest's."""
_KINDS_HERE: Final = ("shm", "tcp")
"""They work without an RDMA device, so are tested on this host, which is faster."""
_ON_LOOPBACK: Final = {"LAMINA_RDMA_DEVICE": LOOPBACK_DEVICE}


def prepare_beside_perftest(folder: Path) -> None:
    """Compiles the programs of the benchmark."""
    few = ["--turns=1", "--rounds=50", "--messages=5"]
    run_here([*_CHANNEL, "--kind=shm", *few], folder=folder, cwd=ROOT, timeout_s=120.0)


def beside_perftest(machines: tuple[Machine, ...]) -> Iterator[Row]:
    """A channel's ping-pong and bandwidth beside ib_write_lat and ib_write_bw, in turn on one device.

    The figures depend on what else the two cores do, so medians are told, and what is judged is the best turn of the
    channel beside perftest's median: at perftest's own 2 bytes, and the bandwidth.
    """
    length = [f"--turns={_TURNS}", f"--rounds={_ROUNDS}", f"--spin_us={_SPIN_US}"]
    command = [*_CHANNEL, "--kind=verbs", f"--perftest={LOOPBACK_DEVICE}", *length]
    output = machines[0].run(command, env=_ON_LOOPBACK, timeout_s=240, name="channel")
    ours = json.loads(output.strip().splitlines()[-1])
    native, copied, jitted, theirs = (ours[how] for how in ("native", "copied", "jitted", "perftest"))
    for n in map(str, _LATENCY_NBYTES):
        best = min(native["us"][n]) / median(theirs["us"][n])
        yield judged(
            f"verbs {n} B, one way",
            n != _JUDGED_NBYTES or best <= _MOST_LATENCY,
            f"{_beside(native['us'][n], theirs['us'][n])} of ib_write_lat's {_spread(theirs['us'][n])} us; "
            f"copied {median(copied['us'][n]):.1f}, through XLA {jitted['us'][n]:.1f}",
        )
    yield judged(
        f"verbs {_BANDWIDTH_NBYTES >> 20} MB messages",
        max(native["mib_per_s"]) / median(theirs["mib_per_s"]) >= _LEAST_BANDWIDTH,
        f"{_beside(native['mib_per_s'], theirs['mib_per_s'])} of ib_write_bw's {_spread(theirs['mib_per_s'])} MiB/s; "
        f"copied {median(copied['mib_per_s']):.1f}, through XLA {jitted['mib_per_s']:.1f}",
    )


def _beside(ours: list[float], theirs: list[float]) -> str:
    return f"{_spread(ours)}, {median(ours) / median(theirs):.2f}x"


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
