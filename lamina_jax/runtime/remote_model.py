"""A model worker in another process, maybe on another host, as the engine sees it."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Final

import numpy as np
from absl import logging

from lamina_jax.runtime.control_tcp import ControlLink
from lamina_jax.runtime.errors import WorkerError
from lamina_jax.runtime.messages import (
    Bucket,
    Done,
    ExecutorSettings,
    FromModelWorker,
    Loaded,
    LoadModel,
    MakeExecutor,
    Prepare,
    RunPlans,
    Sampled,
    ToModelWorker,
    Waiting,
)
from lamina_jax.runtime.model_worker import StepRunner
from lamina_jax.runtime.plan import StepPlan, encode_plan

_POLL_MS: Final = 50
# Beyond what the model worker waits for itself, whose errors say more.
_LOAD_TIMEOUT_S: Final = 3600.0
_CONFIGURE_TIMEOUT_S: Final = 300.0
_PREPARE_TIMEOUT_S: Final = 900.0


def load_remotely(link: ControlLink, request: LoadModel) -> Loaded:
    """Has a model worker load a model and reach its attention workers; the link is open.

    Raises:
        WorkerError: the worker cannot, or does not answer in time.
    """
    link.send(request)
    deadline = time.monotonic() + _LOAD_TIMEOUT_S
    while True:
        match _next(link, deadline, "load the model"):
            case Waiting(what=what):
                logging.warning("the model worker waits for %s", what)
            case Loaded() as loaded:
                return loaded


def make_remotely(link: ControlLink, settings: ExecutorSettings) -> "RemoteModelWorker":
    """Has a model worker that has loaded its model get ready for steps. Raises as `load_remotely`."""
    link.send(MakeExecutor(settings))
    _next(link, time.monotonic() + _CONFIGURE_TIMEOUT_S, "get ready")
    return RemoteModelWorker(link)


class RemoteModelWorker(StepRunner):
    """Passes planned steps on; a thread takes the answers."""

    def __init__(self, link: ControlLink) -> None:
        """Args:
        link: to a model worker that is ready for steps; closed with this.
        """
        self._link = link
        self._prepared: set[tuple[Bucket, int]] = set()
        self._num_steps = 0
        # What was asked and is not answered yet, by the number of the step; the answer to Prepare is under None.
        self._asked: dict[int | None, Future[Any]] = {}
        self._error: WorkerError | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._take_answers, name="answers of the model worker", daemon=True)
        self._thread.start()

    def prepare(self, bucket: Bucket, num_batches: int) -> None:
        if (bucket, num_batches) in self._prepared:
            return
        prepared = self._ask(Prepare(bucket=bucket, num_batches=num_batches), None)
        try:
            prepared.result(_PREPARE_TIMEOUT_S)
        except TimeoutError:
            raise WorkerError(f"Waited {_PREPARE_TIMEOUT_S:.0f} s for the model worker to compile a step.") from None
        self._prepared.add((bucket, num_batches))

    def run(self, plans: Sequence[StepPlan]) -> Sequence[Any]:
        step = self._num_steps
        self._num_steps += 1
        sampled = self._ask(RunPlans(step, tuple(encode_plan(plan) for plan in plans)), step)
        return [_Tokens(sampled, i) for i in range(len(plans))]

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def explain(self, error: Exception) -> Exception:
        return error

    def close(self) -> None:
        self._fail(WorkerError("the session with the model worker was closed."))
        if threading.current_thread() is not self._thread:  # which may be the one that collects garbage
            self._thread.join()
        self._link.close()

    def _ask(self, message: ToModelWorker, number: int | None) -> Future[Any]:
        """Sends a message; the future has its answer."""
        answer: Future[Any] = Future()
        with self._lock:
            self.check()
            self._asked[number] = answer
        self._link.send(message)
        return answer

    def _take_answers(self) -> None:
        try:
            while self._error is None:
                match self._link.receive(_POLL_MS):
                    case Done():
                        self._answer(None, None)
                    case Sampled(step=step, tokens=tokens):
                        self._answer(step, [np.frombuffer(each, np.int32) for each in tokens])
        except WorkerError as error:
            self._fail(error)

    def _answer(self, number: int | None, answer: Any) -> None:
        with self._lock:
            asked = self._asked.pop(number, None)
        if asked is not None:
            asked.set_result(answer)

    def _fail(self, error: WorkerError) -> None:
        """The first failure is final, and that of all that is not answered yet."""
        with self._lock:
            self._error = self._error or error
            unanswered, self._asked = self._asked, {}
        for each in unanswered.values():
            each.set_exception(error)


class _Tokens:
    """What a batch will have sampled, for `np.asarray`."""

    def __init__(self, sampled: Future[Sequence[np.ndarray]], index: int) -> None:
        self._sampled = sampled
        self._index = index

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Waits for the tokens, as long as the session lives. Raises WorkerError if it does not."""
        return np.array(self._sampled.result()[self._index], dtype, copy=copy)


def _next(link: ControlLink, deadline: float, what: str) -> FromModelWorker:
    while time.monotonic() < deadline:
        if (message := link.receive(_POLL_MS)) is not None:
            return message
    raise WorkerError(f"Waited for the model worker at {link.address} to {what}, and it did not in time.")
