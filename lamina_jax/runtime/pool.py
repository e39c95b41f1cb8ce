"""The attention workers as the engine sees them: processes of this host, started, told what to do, watched, ended."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
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
from lamina_jax.transport import ChannelAddress

_POLL_MS: Final = 50
_START_TIMEOUT_S: Final = 120.0
_PREPARE_TIMEOUT_S: Final = 600.0
_END_TIMEOUT_S: Final = 5.0
_EXPLAIN_S: Final = 1.0


class AttentionWorkerPool:
    """Starts attention workers; `close` ends them, and so does the end of this process."""

    def __init__(self, environments: Sequence[Mapping[str, str]]) -> None:
        """Args:
        environments: for each worker the variables that are not this process's, `places.attention_environments`.
        """
        self._control = ControlServer()
        self._peers: dict[int, bytes] = {}
        self._memory: dict[int, int | None] = {}
        self._pending: dict[int, int] = dict.fromkeys(range(len(environments)), 0)
        self._answers: dict[int, tuple[ChannelAddress | None, ...]] = {}
        self._processes: list[subprocess.Popen] = []
        try:
            for i, environment in enumerate(environments):
                self._processes.append(self._spawn(i, environment))
        except BaseException:
            self.close()
            raise

    def names(self) -> list[str]:
        """As they appear in errors."""
        return [f"attention worker {i}" for i in self._pending]

    def device_bytes(self) -> int | None:
        """Memory that the worker with the least may take on its device, where that is a GPU. Waits for every worker to
        be up; raises WorkerError if one does not come."""
        self._wait(lambda: len(self._peers) == len(self._processes), _START_TIMEOUT_S, "start")
        return min((n for n in self._memory.values() if n is not None), default=None)

    def configure(self, messages: Sequence[Configure]) -> list[tuple[ChannelAddress | None, ...]]:
        """Waits for every worker to be up and gives each its share.

        Returns:
            For each worker the answers (`Channel.answer`) of its inboxes, then of its outboxes.

        Raises:
            WorkerError: A worker does not come, or does not answer for every channel.
        """
        self._wait(lambda: len(self._peers) == len(self._processes), _START_TIMEOUT_S, "start")
        self._control.remove_files()
        for worker, message in enumerate(messages):
            self._ask(worker, message)
        self.wait_done("attach to its channels", _START_TIMEOUT_S)
        for worker, message in enumerate(messages):
            expected, got = len(message.inboxes) + len(message.outboxes), len(self._answers[worker])
            if got != expected:
                raise WorkerError(
                    f"attention worker {worker} was given {expected} channels to attach to and answered for {got}; it "
                    "must run the same version of lamina_jax."
                )
        return [self._answers[worker] for worker in range(len(messages))]

    def prepare(self, bucket: Bucket, num_batches: int) -> None:
        """Asks every worker to compile a bucket for steps of `num_batches` batches; `wait_done` waits for that."""
        for worker in self._peers:
            self._ask(worker, Prepare(bucket=bucket, num_batches=num_batches))

    def wait_done(self, what: str = "compile a step", timeout_s: float = _PREPARE_TIMEOUT_S) -> None:
        """Waits until everything asked is done. Raises WorkerError naming the workers that are not."""
        self._wait(lambda: not any(self._pending.values()), timeout_s, what)

    def run_step(self, step: RunStep) -> None:
        """Tells every worker to run a step."""
        for peer in self._peers.values():
            self._control.send(peer, step)

    def check(self) -> None:
        """Raises WorkerError if a worker failed or died."""
        self._check_killed()
        while (received := self._control.receive(timeout_ms=0)) is not None:
            self._take(*received)
        self._check_alive()

    def explain(self, error: BaseException) -> WorkerError:
        """The error to show for `error` of a channel, with the worker's own reason if it gives one soon."""
        deadline = time.monotonic() + _EXPLAIN_S
        try:
            self.check()
            while time.monotonic() < deadline:
                self._pump()
                self._check_alive()
        except WorkerError as reason:
            return WorkerError(f"{reason} ({error})")
        return WorkerError(str(error))

    def close(self) -> None:
        """Ends all workers: asked first, then killed. May be called twice."""
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

    def _ask(self, worker: int, message: ToWorker) -> None:
        self._pending[worker] += 1
        self._control.send(self._peers[worker], message)

    def _wait(self, done, timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            self._pump()
            self._check_alive()
            if time.monotonic() > deadline:
                late = [n for i, n in enumerate(self.names()) if i not in self._peers or self._pending[i]]
                raise WorkerError(f"Waited {timeout_s:.0f} s for {', '.join(late)} to {what}.")

    def _pump(self) -> None:
        received = self._control.receive(timeout_ms=_POLL_MS)
        if received is not None:
            self._take(*received)

    def _take(self, peer: bytes, message: Hello | Done | Failed) -> None:
        if isinstance(message, Hello):
            self._peers[message.worker] = peer
            self._memory[message.worker] = message.device_bytes
            return
        worker = next(index for index, known in self._peers.items() if known == peer)
        if isinstance(message, Failed):
            pid = self._processes[worker].pid
            raise WorkerError(f"attention worker {worker} (pid {pid}) failed: {message.message}")
        self._pending[worker] -= 1
        self._answers[worker] = message.answers

    def _check_killed(self) -> None:
        """As `_check_alive`, for deaths that no message explains better."""
        if any((status := process.poll()) is not None and status < 0 for process in self._processes):
            self._check_alive()

    def _check_alive(self) -> None:
        for index, process in enumerate(self._processes):
            status = process.poll()
            if status is not None:
                how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                raise WorkerError(f"attention worker {index} (pid {process.pid}) {how}.")
