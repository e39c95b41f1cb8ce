"""The attention workers as the model worker sees them: told what to do, watched and, on its own host, started."""

import abc
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from lamina_jax.runtime.control import ControlServer
from lamina_jax.runtime.errors import WorkerError
from lamina_jax.runtime.messages import (
    Bucket,
    Configure,
    Done,
    Failed,
    Hello,
    Prepare,
    RunStep,
    Shutdown,
    ToWorker,
)
from lamina_jax.runtime.places import CACHE_SHARE_OF_GPU
from lamina_jax.transport import ChannelAddress

_POLL_MS: Final = 50
_START_TIMEOUT_S: Final = 120.0
_PREPARE_TIMEOUT_S: Final = 600.0
_END_TIMEOUT_S: Final = 5.0
_EXPLAIN_S: Final = 1.0


class AttentionWorkers(abc.ABC):
    """The attention workers of a model: they are asked, answer, and are watched; how they are reached is up to the
    subclass."""

    def __init__(self, count: int) -> None:
        self._pending: dict[int, int] = dict.fromkeys(range(count), 0)
        self._answers: dict[int, tuple[ChannelAddress | None, ...]] = {}

    @abc.abstractmethod
    def names(self) -> list[str]:
        """As they appear in errors."""

    @abc.abstractmethod
    def cache_bytes(self) -> int | None:
        """What the worker with the least memory has for its KV cache; None if all use this host's. Waits for every
        worker to be up; raises WorkerError if one does not come."""

    def configure(self, messages: Sequence[Configure]) -> list[tuple[ChannelAddress | None, ...]]:
        """Waits for every worker to be up and gives each its share.

        Returns:
            For each worker the answers (`Channel.answer`) of its inboxes, then of its outboxes.

        Raises:
            WorkerError: A worker does not come, or does not answer for every channel.
        """
        self._wait_until_up()
        for worker, message in enumerate(messages):
            self._ask(worker, message)
        self.wait_done("attach to its channels", _START_TIMEOUT_S)
        for worker, message in enumerate(messages):
            expected, got = len(message.inboxes) + len(message.outboxes), len(self._answers[worker])
            if got != expected:
                raise WorkerError(
                    f"{self.names()[worker]} was given {expected} channels to attach to and answered for {got}; it "
                    "must run the same version of lamina_jax."
                )
        return [self._answers[worker] for worker in range(len(messages))]

    def prepare(self, bucket: Bucket, num_batches: int) -> None:
        """Asks every worker to compile a bucket for steps of `num_batches` batches; `wait_done` waits for that."""
        for worker in self._pending:
            self._ask(worker, Prepare(bucket=bucket, num_batches=num_batches))

    def wait_done(self, what: str = "compile a step", timeout_s: float = _PREPARE_TIMEOUT_S) -> None:
        """Waits until everything asked is done. Raises WorkerError naming the workers that are not."""
        self._wait(lambda: not any(self._pending.values()), timeout_s, what)

    def run_step(self, step: RunStep) -> None:
        """Tells every worker to run a step."""
        for worker in self._pending:
            self._send(worker, step)

    def check(self) -> None:
        """Raises WorkerError if a worker failed or died."""
        self._check_killed()
        while self._take_next(timeout_ms=0):
            pass
        self._check_alive()

    def explain(self, error: BaseException) -> WorkerError:
        """The error to show for `error` of a channel, with the worker's own reason if it gives one soon."""
        deadline = time.monotonic() + _EXPLAIN_S
        try:
            self.check()
            while time.monotonic() < deadline:
                self._take_next(_POLL_MS)
                self._check_alive()
        except WorkerError as reason:
            return WorkerError(f"{reason} ({error})")
        return WorkerError(str(error))

    @abc.abstractmethod
    def close(self) -> None:
        """Ends what the workers do for this model. May be called twice."""

    @abc.abstractmethod
    def _wait_until_up(self) -> None:
        """Waits for every worker to be up. Raises WorkerError naming those that are not."""

    @abc.abstractmethod
    def _send(self, worker: int, message: ToWorker) -> None:
        """Queues a message for a worker."""

    @abc.abstractmethod
    def _receive(self, timeout_ms: int) -> tuple[int, Done | Failed] | None:
        """The next message of any worker and whose it is; None if there is none within `timeout_ms`."""

    @abc.abstractmethod
    def _check_killed(self) -> None:
        """As `_check_alive`, for deaths that no message explains better."""

    @abc.abstractmethod
    def _check_alive(self) -> None:
        """Raises WorkerError if a worker is known to be gone."""

    @abc.abstractmethod
    def _described(self, worker: int) -> str:
        """A worker with its process."""

    def _is_late(self, worker: int) -> bool:
        return self._pending[worker] > 0

    def _ask(self, worker: int, message: ToWorker) -> None:
        self._pending[worker] += 1
        self._send(worker, message)

    def _wait(self, done: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            self._take_next(_POLL_MS)
            self._check_alive()
            if time.monotonic() > deadline:
                late = [name for i, name in enumerate(self.names()) if self._is_late(i)]
                raise WorkerError(f"Waited {timeout_s:.0f} s for {', '.join(late)} to {what}.")

    def _take_next(self, timeout_ms: int) -> bool:
        """Takes in the next message, if one comes in time."""
        received = self._receive(timeout_ms)
        if received is None:
            return False
        worker, message = received
        if isinstance(message, Failed):
            raise WorkerError(f"{self._described(worker)} failed: {message.message}")
        self._pending[worker] -= 1
        self._answers[worker] = message.answers
        return True


class AttentionWorkerPool(AttentionWorkers):
    """Starts attention workers as processes of this host; `close` ends them, and so does the end of this process."""

    def __init__(self, environments: Sequence[Mapping[str, str]]) -> None:
        """Args:
        environments: for each worker the variables that are not this process's, `places.attention_environments`.
        """
        super().__init__(len(environments))
        self._control = ControlServer()
        self._peers: dict[int, bytes] = {}
        self._memory: dict[int, int | None] = {}
        self._processes: list[subprocess.Popen] = []
        try:
            for i, environment in enumerate(environments):
                self._processes.append(self._spawn(i, environment))
        except BaseException:
            self.close()
            raise

    def names(self) -> list[str]:
        return [f"attention worker {i}" for i in self._pending]

    def cache_bytes(self) -> int | None:
        self._wait_until_up()
        smallest = min((n for n in self._memory.values() if n is not None), default=None)
        return smallest and int(CACHE_SHARE_OF_GPU * smallest)

    def close(self) -> None:
        """Ends all workers: asked first, then killed."""
        try:
            self._end_politely()
        finally:
            # Also when a second Ctrl-C comes while the workers are still ending.
            for process in self._processes:
                process.kill()
            for process in self._processes:
                process.wait()
            self._control.close()

    def _end_politely(self) -> None:
        running = [(self._processes[i], peer) for i, peer in self._peers.items() if self._processes[i].poll() is None]
        self._peers.clear()
        for _, peer in running:
            self._control.send(peer, Shutdown())
        deadline = time.monotonic() + _END_TIMEOUT_S
        for process, _ in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))

    def _spawn(self, index: int, environment: Mapping[str, str]) -> subprocess.Popen:
        command = [sys.executable, "-m", "lamina_jax.runtime.attention_worker"]
        arguments = [f"--control={self._control.address}", f"--index={index}", f"--engine_pid={os.getpid()}"]
        # A group of its own: a Ctrl-C in the terminal reaches the engine alone, which then ends its workers.
        return subprocess.Popen(
            command + arguments,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
            process_group=0,
        )

    def _wait_until_up(self) -> None:
        self._wait(lambda: len(self._peers) == len(self._processes), _START_TIMEOUT_S, "start")
        # Nobody else is to come.
        self._control.remove_files()

    def _send(self, worker: int, message: ToWorker) -> None:
        # None is left once `close` has begun.
        if (peer := self._peers.get(worker)) is not None:
            self._control.send(peer, message)

    def _receive(self, timeout_ms: int) -> tuple[int, Done | Failed] | None:
        received = self._control.receive(timeout_ms)
        if received is None:
            return None
        peer, message = received
        if isinstance(message, Hello):
            self._peers[message.worker] = peer
            self._memory[message.worker] = message.device_bytes
            return None
        return next(index for index, known in self._peers.items() if known == peer), message

    def _is_late(self, worker: int) -> bool:
        return worker not in self._peers or super()._is_late(worker)

    def _described(self, worker: int) -> str:
        return f"attention worker {worker} (pid {self._processes[worker].pid})"

    def _check_killed(self) -> None:
        if any((status := process.poll()) is not None and status < 0 for process in self._processes):
            self._check_alive()

    def _check_alive(self) -> None:
        for index, process in enumerate(self._processes):
            status = process.poll()
            if status is not None:
                how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                raise WorkerError(f"{self._described(index)} {how}.")
