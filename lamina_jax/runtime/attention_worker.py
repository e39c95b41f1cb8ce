"""The attention worker: a process that holds KV cache for its share of the heads and answers q with attention.

It decides nothing. The engine tells it over the control socket which step comes next; the step itself is one XLA
program that reads q, k and v from a channel, keeps the cache in place, and writes the output to another channel.
"""

import contextlib
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import zmq
from absl import app, flags, logging

from lamina_jax.attention.cache import PagedCache, StepTables
from lamina_jax.attention.kernels import get_kernel
from lamina_jax.runtime import timeline
from lamina_jax.runtime.attention_step import AttentionStep
from lamina_jax.runtime.control import ControlClient
from lamina_jax.runtime.gpu_options import compiler_options, exact_products
from lamina_jax.runtime.messages import (
    AttentionWorkerConfig,
    Bucket,
    Configure,
    Done,
    Failed,
    Hello,
    Prepare,
    RunStep,
    Shutdown,
)
from lamina_jax.runtime.places import device_bytes
from lamina_jax.runtime.stamps import first_stamp
from lamina_jax.transport import Channel, ChannelAddress, attach, first_failure
from lamina_jax.transport.recorder import start_recording

_CONTROL = flags.DEFINE_string("control", None, "ZeroMQ address of the engine's control socket.", required=True)
_INDEX = flags.DEFINE_integer("index", None, "Number of this worker, from 0.", required=True)
_ENGINE_PID = flags.DEFINE_integer("engine_pid", None, "The worker ends when this process does.", required=True)

_POLL_MS = 50
# The engine's waits have the deadlines, so it can say who is late, and may be stopped for a while (Ctrl-Z). Should it
# die, the channels and `_end_with` notice at once.
_PATIENCE_S = 24 * 3600.0


class AttentionWorker:
    """One worker's cache, channels and compiled steps."""

    def __init__(self, config: AttentionWorkerConfig, inboxes: Sequence[Channel], outboxes: Sequence[Channel]):
        kernel = get_kernel(config.kernel, jax.devices()[0])
        self._step = AttentionStep(config=config, kernel=kernel, inboxes=inboxes, outboxes=outboxes)
        self._channels = (*inboxes, *outboxes)
        self._compiled: dict[tuple[Bucket, int], jax.stages.Compiled] = {}
        self._stamps = jnp.stack([first_stamp(b) for b in range(len(inboxes))])
        self._cache = PagedCache.zeros(
            num_layers=len(config.layers),
            num_pages=config.num_pages,
            num_kv_heads=config.num_kv_heads,
            page_size=config.page_size,
            head_dim=config.head_dim,
            dtype=config.dtype,
            kv_cache_dtype=config.kv_cache_dtype,
        )
        self._in_flight: deque[Any] = deque()

    def prepare(self, bucket: Bucket, num_batches: int) -> None:
        """Compiles the step of a bucket for so many batches at a time, unless that was done before."""
        if (bucket, num_batches) in self._compiled:
            return
        tables = [StepTables.shapes(bucket.batch, bucket.max_pages)] * num_batches
        batches = jax.ShapeDtypeStruct((num_batches,), jnp.int32)
        step = jax.jit(self._step.run, static_argnames="tokens", donate_argnames="cache")
        platform = jax.devices()[0].platform
        with exact_products(platform, self._cache.k.dtype):
            lowered = step.lower(self._cache, self._stamps, batches, tables, tokens=bucket.tokens)
        self._compiled[bucket, num_batches] = lowered.compile(compiler_options=compiler_options(platform))

    def dispatch(self, message: RunStep) -> None:
        """Puts one step of some batches on the device; returns before it has run."""
        bucket, count = message.bucket, len(message.batches)
        self.prepare(bucket, count)
        array = lambda data, *shape: np.frombuffer(data, np.int32).reshape(count, bucket.batch, *shape)  # noqa: E731
        fields = (array(message.context_lens), array(message.num_new), array(message.block_tables, bucket.max_pages))
        tables = [
            StepTables(context_lens=context_lens, num_new=num_new, block_tables=block_tables)
            for context_lens, num_new, block_tables in zip(*fields, strict=True)
        ]
        batches = np.array(message.batches, np.int32)
        self._cache, self._stamps = self._compiled[bucket, count](self._cache, self._stamps, batches, tables)
        self._in_flight.append(self._stamps)

    def reap(self) -> None:
        """Forgets the steps that have run. Raises the error of one that failed; on a GPU only its channels tell."""
        while self._in_flight and self._in_flight[0].is_ready():
            self._in_flight.popleft().block_until_ready()
            if (failure := first_failure(self._channels)) is not None:
                raise failure


def main(argv: list[str]) -> None:
    del argv
    # The engine ends its workers itself; a Ctrl-C in its terminal must not end them first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    client = ControlClient(_CONTROL.value)
    _end_with(_ENGINE_PID.value, client)
    try:
        client.send(Hello(worker=_INDEX.value, device_bytes=device_bytes(jax.devices()[0])))
        _serve(client)
    except Exception as error:
        logging.info("attention worker %d failed", _INDEX.value, exc_info=True)
        client.send(Failed(message=f"{type(error).__name__}: {error}"))
        client.close()
        # Skips the wait of a normal exit for programs that may still sit in a channel.
        os._exit(1)
    client.close()
    os._exit(0)


def _serve(client: ControlClient) -> None:
    with contextlib.ExitStack() as at_end:
        _obey(client, at_end)


def _obey(client: ControlClient, at_end: contextlib.ExitStack) -> None:
    worker: AttentionWorker | None = None
    while True:
        message = client.receive(timeout_ms=_POLL_MS)
        match message:
            case Shutdown():
                return
            case Configure():
                worker, answers = _configure(message)
                _record(message.config, at_end)
                client.send(Done(answers=answers))
            case Prepare() if worker is not None:
                worker.prepare(message.bucket, message.num_batches)
                client.send(Done())
            case RunStep() if worker is not None:
                worker.dispatch(message)
            case None:
                pass
            case _:
                raise RuntimeError(f"got {type(message).__name__} before Configure")
        if worker is not None:
            worker.reap()


def _configure(message: Configure) -> tuple[AttentionWorker, tuple[ChannelAddress | None, ...]]:
    """The worker, and what the engine has to know of its ends of the channels."""
    config = message.config
    options = {"peer": "model worker", "timeout_s": _PATIENCE_S}
    inboxes = [attach(address, role="reader", **options) for address in message.inboxes]
    outboxes = [attach(address, role="writer", **options) for address in message.outboxes]
    return AttentionWorker(config, inboxes, outboxes), tuple(c.answer for c in (*inboxes, *outboxes))


def _record(config: AttentionWorkerConfig, at_end: contextlib.ExitStack) -> None:
    """Starts this worker's timeline, to be written at the end, also of a run that failed."""
    if config.trace_dir is not None:
        start_recording(timeline.CAPACITY)
        at_end.callback(timeline.write, config.trace_dir, config.name)


def _end_with(pid: int, client: ControlClient) -> None:
    """Ends this process when process `pid` has ended, whatever the main thread is waiting for."""
    try:
        engine = os.pidfd_open(pid)
    except ProcessLookupError:
        client.remove_files()
        sys.exit(f"attention worker: the engine (pid {pid}) is gone already")

    def watch() -> None:
        poller = zmq.Poller()
        poller.register(engine, zmq.POLLIN)
        poller.poll()
        client.remove_files()
        os._exit(1)

    threading.Thread(target=watch, name="engine watch", daemon=True).start()


if __name__ == "__main__":
    app.run(main)
