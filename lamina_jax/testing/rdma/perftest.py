"""Figures of perftest's ib_write_lat and ib_write_bw: what a channel over the same device is compared with."""

import dataclasses
import errno
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

_PORT = 18515
_LISTENING_S = 20.0  # after its start
_LISTENS = "0A"  # in /proc/net/tcp
# Its standard deviation may be nan.
_ROW = re.compile(r"^[ \t]*\d+(?:[ \t]+(?:[0-9.]+|-?nan))+[ \t]*$", re.MULTILINE)


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


@runtime_checkable
class Program(Protocol):
    """Something that was started; `testing.rdma.machines.Job` is one."""

    @property
    def output(self) -> str:
        """What it has written so far."""
        ...

    def check(self, timeout_s: float) -> str:
        """Its output, when it has ended well; raises otherwise, or if that takes longer."""
        ...

    def kill(self) -> None: ...


@runtime_checkable
class Host(Protocol):
    """Where programs run; `testing.rdma.machines.Machine` is one."""

    def start(self, argv: Sequence[str | Path], /, *, name: str | None = None) -> Program: ...

    def wait_for_port(self, port: int, timeout_s: float) -> None:
        """Returns when something listens on a TCP port; raises if nothing does in time."""
        ...


class ThisHost:
    """A `Host`: the one that this process runs on. A program that is missing, fails or takes too long is an OSError."""

    def start(self, argv: Sequence[str | Path], /, *, name: str | None = None) -> Program:
        del name
        return _Here([str(argument) for argument in argv])

    def wait_for_port(self, port: int, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not _listens(port):
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing has listened on port {port} for {timeout_s:.0f} s")
            time.sleep(0.01)


class _Here:
    def __init__(self, argv: Sequence[str]):
        self._argv = argv
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(argv, stdout=self._log, stderr=subprocess.STDOUT)
        except FileNotFoundError as error:
            self._log.close()
            raise OSError(errno.ENOENT, f"no {argv[0]}: install perftest") from error

    @property
    def output(self) -> str:
        # Without moving the place where the program writes on.
        return os.pread(self._log.fileno(), 1 << 20, 0).decode(errors="replace")

    def check(self, timeout_s: float) -> str:
        command = " ".join(self._argv)
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"{command} has not ended within {timeout_s:.0f} s\n{self.output}") from None
        if status != 0:
            raise OSError(errno.EIO, f"{command} ended with status {status}\n{self.output}")
        return self.output

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def __del__(self) -> None:
        self._log.close()


def _listens(port: int) -> bool:
    for table in Path("/proc/net").glob("tcp*"):
        for line in table.read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == _LISTENS and int(local.rpartition(":")[2], 16) == port:
                return True
    return False


def write_latency(
    server: Host,
    client: Host,
    *,
    device: str,
    gid_index: int,
    address: str,
    nbytes: int,
    iterations: int = 1000,
    timeout_s: float = 60.0,
) -> Latency:
    """Latency of RDMA writes between two hosts, or within one.

    Args:
        server: Where ib_write_lat listens.
        client: Where the other one runs, which measures.
        device: RDMA device of both.
        gid_index: Of the address of both in the device's table.
        address: Of the server, for TCP; "127.0.0.1" within one host.
        nbytes: Size of a message.
        iterations: Round trips.
        timeout_s: Seconds that all may take.

    Raises:
        OSError, JobError: A program failed or took too long, as the host says it.
        ValueError: It wrote no figures.
    """
    options = ["-d", device, "-x", str(gid_index), "-s", str(nbytes), "-n", str(iterations)]
    return parse_latency(_run_pair("ib_write_lat", server, client, options, address, timeout_s))


def write_bandwidth(
    server: Host,
    client: Host,
    *,
    device: str,
    gid_index: int,
    address: str,
    nbytes: int,
    iterations: int = 200,
    timeout_s: float = 60.0,
) -> Bandwidth:
    """Bandwidth of RDMA writes; arguments and errors are those of `write_latency`, iterations are messages."""
    options = ["-d", device, "-x", str(gid_index), "-s", str(nbytes), "-n", str(iterations)]
    return parse_bandwidth(_run_pair("ib_write_bw", server, client, options, address, timeout_s))


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


def _run_pair(program: str, server: Host, client: Host, options: Sequence[str], address: str, timeout_s: float) -> str:
    """What the client wrote."""
    deadline = time.monotonic() + timeout_s
    command = [program, "-p", str(_PORT), "-F", *options]
    listening = server.start(command, name=f"{program} server")
    try:
        try:
            server.wait_for_port(_PORT, timeout_s=min(timeout_s, _LISTENING_S))
        except Exception as error:
            raise OSError(errno.EIO, f"{program} does not listen on port {_PORT}: {listening.output}") from error
        measuring = client.start([*command, address], name=f"{program} client")
        try:
            output = measuring.check(deadline - time.monotonic())
        finally:
            measuring.kill()
        listening.check(max(deadline - time.monotonic(), 1.0))
        return output
    finally:
        listening.kill()
