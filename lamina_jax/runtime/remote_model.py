"""A model worker in another process, maybe on another host, as the engine sees it."""

import concurrent.futures
import threading
import time
from collections.abc import Callable, Sequence
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
    Waiting,
)
from lamina_jax.runtime.model_worker import StepRunner
from lamina_jax.runtime.plan import StepPlan, encode_plan

_POLL_MS: Final = 50
# Beyond what the model worker waits for itself; its own errors say more.
_LOAD_TIMEOUT_S: Final = 3600.0
_PREPARE_TIMEOUT_S: Final = 700.0
_CONFIGURE_TIMEOUT_S: Final = 300.0


def load_remotely(link: ControlLink, request: LoadModel) -> Loaded:
    """Has a model worker load a model and reach its attention workers; the link is open.

    Raises:
        WorkerError: the worker cannot, or does not answer in time.
    """
    link.send(request)
    deadline = time.monotonic() + _LOAD_TIMEOUT_S
    while True:
        message = _next(link, deadline, "load the model")
        if isinstance(message, Loaded):
            return message
        if isinstance(message, Waiting):
            logging.warning("the model worker: %s", message.what)


def make_remotely(link: ControlLink, settings: ExecutorSettings) -> "RemoteModelWorker":
    """Has a model worker that has loaded its model get ready for steps. Raises as `load_remotely`."""
    link.send(MakeExecutor(settings))
    _next(link, time.monotonic() + _CONFIGURE_TIMEOUT_S, "get ready")
    return RemoteModelWorker(link)
