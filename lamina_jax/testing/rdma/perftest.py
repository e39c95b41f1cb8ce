"""Figures of perftest's ib_write_lat and ib_write_bw: what a channel over the same device is compared with."""

import dataclasses
import re
import time

from lamina_jax.testing.rdma.machines import GID_INDEX, Job, Machine

_PORT = 18515
_ROW = re.compile(r"^\s*\d+(?:\s+[0-9.]+)+\s*$", re.MULTILINE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latency:
    """Of one way, as ib_write_lat counts it: half a round trip.

    Attributes:
        nbytes: Size of a message.
        iterations: Round trips.
        min_us: The shortest.
        median_us: The median, which perftest calls typical.
        mean_us: The mean.
        p99_us: 99 % are shorter.
    """

    nbytes: int
    iterations: int
    min_us: float
    median_us: float
    mean_us: float
    p99_us: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bandwidth:
    """One way, as ib_write_bw counts it.

    Attributes:
        nbytes: Size of a message.
        iterations: Messages.
        peak_mib_s: 2^20 bytes per second at best.
        mean_mib_s: The same over the whole run.
    """

    nbytes: int
    iterations: int
    peak_mib_s: float
    mean_mib_s: float


def write_latency(
    server: Machine,
    client: Machine,
    *,
    device: str,
    nbytes: int,
    iterations: int = 1000,
    address: str | None = None,
    timeout_s: float = 60.0,
) -> Latency:
    """Latency of RDMA writes between two machines, or within one.

    Args:
        server: Where ib_write_lat listens.
        client: Where the other one runs, which measures.
        device: RDMA device of both.
        nbytes: Size of a message.
        iterations: Round trips.
        address: Of the server; "127.0.0.1" within one machine. That of its eth0 by default.
        timeout_s: Seconds that all may take.

    Raises:
        JobError: A program failed or took too long.
        ValueError: It wrote no figures.
    """
    options = ["-s", str(nbytes), "-n", str(iterations)]
    return parse_latency(_run_pair("ib_write_lat", server, client, device, options, address, timeout_s))


def write_bandwidth(
    server: Machine,
    client: Machine,
    *,
    device: str,
    nbytes: int,
    iterations: int = 200,
    address: str | None = None,
    timeout_s: float = 60.0,
) -> Bandwidth:
    """Bandwidth of RDMA writes; arguments and errors are those of `write_latency`, iterations are messages."""
    options = ["-s", str(nbytes), "-n", str(iterations)]
    return parse_bandwidth(_run_pair("ib_write_bw", server, client, device, options, address, timeout_s))


def parse_latency(output: str) -> Latency:
    """Reads what ib_write_lat has written. Raises ValueError if there are no figures in it."""
    nbytes, iterations, least, _, typical, mean, _, p99, *_ = _figures(output, "ib_write_lat", 9)
    return Latency(
        nbytes=int(nbytes), iterations=int(iterations), min_us=least, median_us=typical, mean_us=mean, p99_us=p99
    )


def parse_bandwidth(output: str) -> Bandwidth:
    """Reads what ib_write_bw has written. Raises ValueError if there are no figures in it."""
    nbytes, iterations, peak, mean, *_ = _figures(output, "ib_write_bw", 5)
    return Bandwidth(nbytes=int(nbytes), iterations=int(iterations), peak_mib_s=peak, mean_mib_s=mean)


def _figures(output: str, program: str, count: int) -> list[float]:
    rows = [row.split() for row in _ROW.findall(output)]
    rows = [row for row in rows if len(row) == count]
    if len(rows) != 1:
        raise ValueError(f"expected one row of {count} figures from {program}, got {len(rows)} in\n{output}")
    return [float(figure) for figure in rows[0]]


def _run_pair(
    program: str,
    server: Machine,
    client: Machine,
    device: str,
    options: list[str],
    address: str | None,
    timeout_s: float,
) -> str:
    """What the client wrote."""
    deadline = time.monotonic() + timeout_s
    command = [program, "-d", device, "-x", str(GID_INDEX), "-p", str(_PORT), "-F", *options]
    listening: Job = server.start(command, name=f"{program} server")
    try:
        server.wait_for_port(_PORT, timeout_s=timeout_s)
        output = client.run(
            [*command, address or server.address], timeout_s=deadline - time.monotonic(), name=f"{program} client"
        )
        listening.check(max(deadline - time.monotonic(), 1.0))
        return output
    finally:
        listening.kill()
