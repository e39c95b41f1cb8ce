"""Runs checks in virtual machines, each within its time, and makes rows of what they find."""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Final

import psutil

from lamina_jax.testing.rdma.image import Image
from lamina_jax.testing.rdma.machines import Machine, at_once, machines
from lamina_jax.testing.rdma.report import Row, failed, passed
from lamina_jax.testing.rdma.warm_python import OF_ALL, OF_ATTENTION_WORKERS

_LEAST_S: Final = 5.0
"""A check that would get less than that is not begun."""
_GRACE_S: Final = 30.0
"""How long machines may live beyond the end of all checks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """Something to find out in machines.

    Attributes:
        name: Of its rows, if it yields none or fails.
        run: Given the machines there are, yields rows; their seconds are filled in. To raise is to fail.
        num_machines: How many it needs at least: 1 or 2.
        limit_s: Seconds after which it is interrupted.
        prepare: Given the folder that all machines share, does here what would take them long, once they are booted.
    """

    name: str
    run: Callable[[tuple[Machine, ...]], Iterator[Row]]
    num_machines: int
    limit_s: float
    prepare: Callable[[Path], None] | None = None


class _TimeUpError(BaseException):
    """Raised in the main thread by a clock; no handler of mere errors catches it."""


class Runner:
    """Runs checks in the main thread, within a time that they have together.

    Attributes:
        rows: What was found so far.
    """

    def __init__(self, *, image: Image, folder: Path, limit_s: float, show: Callable[[Row], None]):
        """Args:
        image: What machines boot from.
        folder: For what machines and jobs write.
        limit_s: Seconds that all checks may take together.
        show: Called with every row as it comes.
        """
        self.rows: list[Row] = []
        self._image = image
        self._folder = folder
        self._deadline = time.monotonic() + limit_s
        self._limit_s = limit_s
        self._show = show
        self._num_boots = 0

    def run(self, checks: Sequence[Check]) -> None:
        """Runs all in their order, in one boot of as many machines as any of them needs.

        Between two checks the machines are reset. A check that left a process or a file behind has failed, but for
        jobs of its own that still run: these are killed. Machines that are gone are booted again.
        """
        waiting = list(checks)
        while waiting:
            num_waiting = len(waiting)
            self._boot(waiting)
            if len(waiting) == num_waiting:
                self._note(failed(waiting.pop(0).name, "no machine to run it in"), time.monotonic())

    def _boot(self, waiting: list[Check]) -> None:
        """Runs checks in one boot, and takes them off the list, until they are done or a machine is gone."""
        start = time.monotonic()
        count = max(check.num_machines for check in waiting)
        self._num_boots += 1
        name = f"boot {self._num_boots}: {count} machine{'s' * (count > 1)}"
        limit_s = max(self._deadline - start, 0.0) + _GRACE_S
        folder = self._folder / f"boot-{self._num_boots}"
        folder.mkdir(parents=True)
        try:
            with contextlib.ExitStack() as stack:
                pool = stack.enter_context(ThreadPoolExecutor(1))
                # By then the machines are closed, and what else this process has started since prepares a check.
                stack.callback(_kill_children, {*psutil.Process().children(recursive=True)})
                stack.callback(pool.shutdown, wait=False, cancel_futures=True)
                booted = stack.enter_context(machines(count, folder=folder, image=self._image, limit_s=limit_s))
                self._note(passed(name), start)
                # Not before: a machine that boots has more processors at work than this one.
                prepared = [pool.submit(_prepare, check, folder) if check.prepare else None for check in waiting]
                # Engines and model workers are on the first.
                for machine, modules in zip(booted, (OF_ALL, OF_ATTENTION_WORKERS), strict=False):
                    machine.warm_python(modules)
                while waiting and all(machine.alive for machine in booted):
                    self._check(waiting.pop(0), prepared.pop(0), booted)
        except Exception as error:
            self._note(failed(name, _words(error)), start)

    def _check(self, check: Check, prepared: Future[Row | None] | None, booted: tuple[Machine, ...]) -> None:
        start = time.monotonic()
        limit_s = min(check.limit_s, self._deadline - start)
        if limit_s < min(check.limit_s, _LEAST_S):
            self._note(failed(check.name, f"not begun: the {self._limit_s:.0f} s of all checks were up"), start)
            return
        try:
            with _time_limit(limit_s):
                if prepared is not None and (row := prepared.result()) is not None:
                    self._note(row, start)
                num_rows = len(self.rows)
                for row in check.run(booted):
                    self._note(row, start)
                    start = time.monotonic()
            if len(self.rows) == num_rows:
                self._note(failed(check.name, "found nothing to check"), start)
        except _TimeUpError:
            self._note(failed(check.name, f"its time was up after {limit_s:.0f} s"), start)
        except Exception as error:
            self._note(failed(check.name, _words(error)), start)
        start = time.monotonic()
        alive = [machine for machine in booted if machine.alive]
        for machine, left in zip(alive, at_once(Machine.reset, alive), strict=True):
            if left:
                self._note(failed(check.name, f"left behind on machine {machine.name}: {', '.join(left)}"), start)

    def _note(self, row: Row, start: float) -> None:
        self.rows.append(dataclasses.replace(row, seconds=time.monotonic() - start))
        self._show(self.rows[-1])


def _prepare(check: Check, folder: Path) -> Row | None:
    """Says what went wrong; the check is run all the same."""
    try:
        if check.prepare is not None:
            check.prepare(folder)
    except Exception as error:
        return failed(f"{check.name}, prepared here", _words(error))
    return None


def _kill_children(but: Set[psutil.Process]) -> None:
    for child in {*psutil.Process().children(recursive=True)} - but:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises _TimeUpError in the main thread, which must be this one, when the time is up."""

    def ring(_signal: int, _frame: FrameType | None) -> None:
        raise _TimeUpError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
