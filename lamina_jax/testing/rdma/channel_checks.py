"""Checks of channels over RDMA: beside perftest on the same device, and what they do when something breaks."""

import json
import re
import sys
from collections.abc import Iterator
from typing import Any, Final

from lamina_jax.testing.rdma.machines import LOOPBACK_DEVICE, Machine
from lamina_jax.testing.rdma.perftest import write_bandwidth, write_latency
from lamina_jax.testing.rdma.report import Row, failed, judged, passed

LATENCY_NBYTES: Final = (2, 2048, 32768)
BANDWIDTH_NBYTES: Final = 1 << 20
BREAKAGE_LIMIT_S: Final = 150.0

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
    command = [sys.executable, "benchmarks/channel_native.py", "--kind=verbs", f"--sizes={sizes}"]
    output = machine.run(command, env=_ON_LOOPBACK, timeout_s=120, name="channel")
    return json.loads(output.strip().splitlines()[-1])


def breakage(machines: tuple[Machine, ...]) -> Iterator[Row]:
    """tests/transport/test_verbs.py: queue pair and completion queue that fail, memory refused, a peer that is gone."""
    (machine,) = machines
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers"]
    job = machine.start([*command, "tests/transport/test_verbs.py"], env=_ON_LOOPBACK, name="breakage")
    status = job.wait(timeout_s=BREAKAGE_LIMIT_S)
    outcomes = re.findall(r"^\S+::test_(\S+) (PASSED|FAILED|ERROR)", job.output, re.MULTILINE)
    for test, outcome in outcomes:
        yield judged(f"verbs: {test.replace('_', ' ')}", outcome == "PASSED", "")
    if status != 0 or not outcomes:
        yield failed("verbs", f"pytest ended with status {status}: {job.output.strip().splitlines()[-1]}")
