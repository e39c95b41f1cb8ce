"""What `scripts/rdma_test.py` looks at, in one list."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from lamina_jax.testing.rdma.channel_checks import (
    CHANNELS_LIMIT_S,
    KILL_SEEDS,
    beside_perftest,
    channels,
    channels_here,
    prepare_beside_perftest,
    prepare_channels,
    start_channels,
)
from lamina_jax.testing.rdma.cluster_checks import prepare_tokens, prepare_two_hosts, tokens_on_one_machine, two_hosts
from lamina_jax.testing.rdma.machines import DEVICE, GID_INDEX, LOOPBACK_DEVICE, Machine, share_processors
from lamina_jax.testing.rdma.report import Row, failed, judged
from lamina_jax.testing.rdma.runner import Check


def devices(machines: tuple[Machine, ...]) -> Iterator[Row]:
    """Every machine has its RDMA devices, and pyverbs opens them."""
    script = f"""
import pyverbs.device as d
for found in d.get_device_list():
    name = found.name.decode()
    with d.Context(name=name) as context:
        port = context.query_port(1)
        print(name, "state", port.state, "mtu", 128 << port.active_mtu, "gid", context.query_gid(1, {GID_INDEX}))
"""
    jobs = [machine.start([sys.executable, "-c", script], name="pyverbs") for machine in machines]
    for machine, job in zip(machines, jobs, strict=True):
        lines = job.check(timeout_s=60).splitlines()
        active = {line.split()[0] for line in lines if "state 4" in line}
        detail = "; ".join(lines) or "pyverbs finds none"
        yield judged(f"devices of machine {machine.name}", active == {DEVICE, LOOPBACK_DEVICE}, detail)


def prepare_channels_and_tokens(folder: Path) -> None:
    """Compiles what they run; what needs no machine is run."""
    prepare_tokens(folder)
    prepare_channels(folder)


def channels_and_tokens(machines: tuple[Machine, ...]) -> Iterator[Row]:
    """Tests of channels and a run of a model: at the same time if there are two machines, else one after the other."""
    share_processors(machines)
    a, *others = machines
    job = start_channels(others[0]) if others else None
    yield from _or_failed("tokens over verbs, one machine", tokens_on_one_machine(a))
    yield from channels(job or start_channels(a))
    yield from channels_here(a.folder.parent)


def _or_failed(name: str, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows; if there are no more because of an error, that."""
    try:
        yield from rows
    except Exception as error:
        yield failed(name, f"{type(error).__name__}: {error}")


CHECKS: Final = (
    # First, as it can begin on a machine while the other imports what its jobs share.
    Check(
        name="channels and tokens",
        run=channels_and_tokens,
        num_machines=1,
        limit_s=CHANNELS_LIMIT_S + 300,
        prepare=prepare_channels_and_tokens,
    ),
    Check(name="devices", run=devices, num_machines=1, limit_s=90),
    Check(
        name="channel beside perftest",
        run=beside_perftest,
        num_machines=1,
        limit_s=500,
        prepare=prepare_beside_perftest,
    ),
    Check(
        name="two by docs/deploy.md",
        run=two_hosts,
        num_machines=2,
        limit_s=1100 + 120 * KILL_SEEDS,
        prepare=prepare_two_hosts,
    ),
)
