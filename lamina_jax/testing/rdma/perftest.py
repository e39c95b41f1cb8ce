"""Figures of perftest's ib_write_lat and ib_write_bw within this host: what a channel is compared with."""

import errno
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

_PORT = 18515
_HERE = "127.0.0.1"
_LISTENING_S = 20.0  # after its start
_LISTENS = "0A"  # in /proc/net/tcp
# Its standard deviation may be nan.
_ROW = re.compile(r"^[ \t]*\d+(?:[ \t]+(?:[0-9.]+|-?nan))+[ \t]*$", re.MULTILINE)


def write_latency(
    *, device: str, gid_index: int, nbytes: int, iterations: int = 1000, timeout_s: float = 60.0
) -> float:
    """Median of half a round trip of RDMA writes, in microseconds.

    Args:
        device: RDMA device of both ends.
        gid_index: of an address in the device's table.
        nbytes: size of a message.
        iterations: round trips.
        timeout_s: seconds that all may take.

    Raises:
        OSError: ib_write_lat is missing, failed or took too long.
        ValueError: it wrote no figures.
    """
    options = ["-d", device, "-x", str(gid_index), "-s", str(nbytes), "-n", str(iterations)]
    return parse_latency(_run_pair("ib_write_lat", options, timeout_s))


def write_bandwidth(
    *, device: str, gid_index: int, nbytes: int, iterations: int = 200, timeout_s: float = 60.0
) -> float:
    """Bandwidth of RDMA writes one way, in MiB/s; arguments and errors are those of `write_latency`, iterations are
    messages."""
    options = ["-d", device, "-x", str(gid_index), "-s", str(nbytes), "-n", str(iterations)]
    return parse_bandwidth(_run_pair("ib_write_bw", options, timeout_s))


def parse_latency(output: str) -> float:
    """The median that ib_write_lat has written, in microseconds. Raises ValueError if there are no figures."""
    # Bytes, iterations, minimum, maximum, the median (which it calls typical), mean, deviation and two percentiles.
    return _figures(output, "ib_write_lat", 9)[4]


def parse_bandwidth(output: str) -> float:
    """The mean that ib_write_bw has written, in MiB/s. Raises ValueError if there are no figures."""
    # Bytes, iterations, peak, mean and messages per second.
    return _figures(output, "ib_write_bw", 5)[3]


def _figures(output: str, program: str, count: int) -> list[float]:
    rows = [row.split() for row in _ROW.findall(output)]
    rows = [row for row in rows if len(row) == count]
    if len(rows) != 1:
        raise ValueError(f"expected one row of {count} figures from {program}, got {len(rows)} in\n{output}")
    return [float(figure) for figure in rows[0]]


def _run_pair(program: str, options: Sequence[str], timeout_s: float) -> str:
    """What the one that measures wrote."""
    deadline = time.monotonic() + timeout_s
    command = [program, "-p", str(_PORT), "-F", *options]
    with _Program(command) as listening:
        ready_by = time.monotonic() + min(timeout_s, _LISTENING_S)
        while not _listens(_PORT):
            if listening.ended or time.monotonic() > ready_by:
                raise OSError(errno.EIO, f"{program} does not listen on port {_PORT}: {listening.output}")
            time.sleep(0.01)
        with _Program([*command, _HERE]) as measuring:
            output = measuring.check(deadline - time.monotonic())
        listening.check(max(deadline - time.monotonic(), 1.0))
        return output


class _Program:
    """A program that is killed at the end of `with`."""

    def __init__(self, argv: Sequence[str]):
        self._argv = argv
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(argv, stdout=self._log, stderr=subprocess.STDOUT)
        except FileNotFoundError as error:
            self._log.close()
            raise OSError(errno.ENOENT, f"no {argv[0]}: install perftest") from error

    def __enter__(self) -> "_Program":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def output(self) -> str:
        """What it has written so far."""
        # Without moving the place where the program writes on.
        return os.pread(self._log.fileno(), 1 << 20, 0).decode(errors="replace")

    def check(self, timeout_s: float) -> str:
        """Its output, when it has ended with status 0. Raises OSError otherwise, or if that takes longer."""
        command = " ".join(self._argv)
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{command} has not ended within {timeout_s:.0f} s\n{self.output}") from None
        if status != 0:
            raise OSError(errno.EIO, f"{command} ended with status {status}\n{self.output}")
        return self.output


def _listens(port: int) -> bool:
    for table in Path("/proc/net").glob("tcp*"):
        for line in table.read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == _LISTENS and int(local.rpartition(":")[2], 16) == port:
                return True
    return False
