"""Checks of channels over RDMA: beside perftest on the same device, and what they do when something breaks."""

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from typing import Any, Final

from lamina_jax.testing.rdma.machines import LOOPBACK_DEVICE, JobError, Machine
from lamina_jax.testing.rdma.perftest import write_bandwidth, write_latency
from lamina_jax.testing.rdma.report import Row, failed, judged, passed
from lamina_jax.transport import channel_kinds

LATENCY_NBYTES: Final = (2, 2048, 32768)
BANDWIDTH_NBYTES: Final = 1 << 20
CHANNELS_LIMIT_S: Final = 240.0

_CONFORMANCE_TESTS: Final = (
    "every-dtype",
    "test_round_trips_in_a_scan",
    "test_full_ring_is_a_deadline_error",
    "test_peer_ends_our_wait",
)
"""Not all, as JAX is 20 times slower in a machine, and none that starts a process of its own."""
_PYTEST: Final = (
    *(sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers"),
    # What the warm Python has imported.
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),
)
"""Runs tests in a machine, without checking types, and writes nothing into the checkout."""

_SPIN_US: Final = 10000
"""Longer than a wait lasts here: perftest never sleeps either."""
_ON_LOOPBACK: Final = {"LAMINA_RDMA_DEVICE": LOOPBACK_DEVICE}


def beside_perftest(machines: tuple[Machine, ...]) -> Iterator[Row]:
    """A channel's ping-pong and bandwidth beside ib_write_lat and ib_write_bw, in turn on one device.

    The figures depend on what else the two cores do, so they are told and not judged.
    """
    (machine,) = machines
    lat = {n: [_perftest_latency(machine, n)] for n in LATENCY_NBYTES}
    bandwidth = write_bandwidth(
        machine, machine, device=LOOPBACK_DEVICE, nbytes=BANDWIDTH_NBYTES, address="127.0.0.1", iterations=50
    )
    channel = _channel_figures(machine)
    for n in LATENCY_NBYTES:
        lat[n].append(_perftest_latency(machine, n))
        theirs = sum(lat[n]) / 2
        native = channel["native_us"][str(n)]
        jitted = channel["jitted_us"].get(str(n))
        also = f", through XLA {jitted:.1f} us" if jitted is not None else ""
        yield passed(
            f"verbs {n} B, one way",
            f"{native:.1f} us, {native / theirs:.2f}x of ib_write_lat's {lat[n][0]:.1f} and {lat[n][1]:.1f} us{also}",
        )
    ours = channel["mib_per_s"]
    yield passed(
        f"verbs {BANDWIDTH_NBYTES >> 20} MB messages",
        f"{ours:.1f} MiB/s, {ours / bandwidth.mean_mib_s:.2f}x of ib_write_bw's {bandwidth.mean_mib_s:.1f} MiB/s",
    )


def _perftest_latency(machine: Machine, nbytes: int) -> float:
    rounds = 1000 if nbytes < 4096 else 200
    return write_latency(
        machine, machine, device=LOOPBACK_DEVICE, nbytes=nbytes, address="127.0.0.1", iterations=rounds
    ).median_us


def _channel_figures(machine: Machine) -> dict[str, Any]:
    sizes = ",".join(map(str, LATENCY_NBYTES))
    command = [
        sys.executable,
        "benchmarks/channel_native.py",
        "--kind=verbs",
        f"--sizes={sizes}",
        f"--spin_us={_SPIN_US}",
    ]
    output = machine.run(command, env=_ON_LOOPBACK, timeout_s=120, name="channel")
    return json.loads(output.strip().splitlines()[-1])


def channels(machines: tuple[Machine, ...]) -> Iterator[Row]:
    """The conformance tests of each kind of channel there is, and tests/transport/test_verbs.py: what may break."""
    (machine,) = machines
    kinds = [kind for kind in ("shm", "tcp", "verbs") if kind in channel_kinds()]
    chosen = f"test_verbs or ({' or '.join(kinds)}) and ({' or '.join(_CONFORMANCE_TESTS)})"
    files = ["tests/transport/test_channel.py", "tests/transport/test_verbs.py"]
    job = machine.start([*_PYTEST, "-k", chosen, *files], env=_ON_LOOPBACK, name="channels")
    with contextlib.suppress(JobError):  # killed when its time is up: what it found until then counts
        job.wait(timeout_s=CHANNELS_LIMIT_S)
    for kind in kinds:
        outcomes = re.findall(rf"^\S+test_channel\S+::(\w+)\[\S*\b{kind}\b\S*\] (\w+)", job.output, re.MULTILINE)
        wrong = [test for test, outcome in outcomes if outcome != "PASSED"]
        detail = f"{len(outcomes) - len(wrong)} of {len(outcomes)} tests passed; {', '.join(wrong)}".rstrip("; ")
        yield judged(f"conformance of {kind}", bool(outcomes) and not wrong, detail)
    for test, outcome in re.findall(r"^\S+test_verbs\S+::test_(\S+) (PASSED|FAILED|ERROR)", job.output, re.MULTILINE):
        yield judged(f"verbs: {test.replace('_', ' ')}", outcome == "PASSED", "")
    if job.status != 0:
        last = job.output.strip().rpartition("\n")[2]
        yield failed("channels", f"pytest ended with status {job.status} after {job.seconds:.0f} s: {last}")
