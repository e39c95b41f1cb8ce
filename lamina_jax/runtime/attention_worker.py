"""The attention worker: a process that holds KV cache for its share of the heads and answers q with attention.

It decides nothing. The engine tells it over the control socket which step comes next; the step itself is one XLA
program that reads q, k and v from a channel, keeps the cache in place, and writes the output to another channel.
"""

import os
import signal
import sys
import threading
from collections import deque
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import zmq
from absl import app, flags, logging

from lamina_jax.attention.cache import PagedCache, StepTables, append
from lamina_jax.attention.kernels import get_kernel
from lamina_jax.attention.merge import merge
from lamina_jax.runtime.control import ControlClient
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
from lamina_jax.runtime.stamps import first_stamp, next_layer, next_step
from lamina_jax.transport import Channel, Tag, attach, recv, send

_CONTROL = flags.DEFINE_string("control", None, "ZeroMQ address of the engine's control socket.", required=True)
_INDEX = flags.DEFINE_integer("index", None, "Number of this worker, from 0.", required=True)
_ENGINE_PID = flags.DEFINE_integer("engine_pid", None, "The worker ends when this process does.", required=True)

_POLL_MS = 50


class AttentionWorker:
    """One worker's cache, channels and compiled steps."""

    def __init__(self, config: AttentionWorkerConfig, inbox: Channel, outbox: Channel):
        self._config = config
        self._inbox, self._outbox = inbox, outbox
        self._kernel = get_kernel(config.kernel)
        self._compiled: dict[Bucket, jax.stages.Compiled] = {}
        self._stamp = first_stamp()
        self._cache = PagedCache.zeros(
            num_layers=len(config.scales),
            num_pages=config.num_pages,
            num_kv_heads=config.num_kv_heads,
            page_size=config.page_size,
            head_dim=config.head_dim,
            dtype=config.dtype,
        )
        self._in_flight: deque[Any] = deque()

    def prepare(self, bucket: Bucket) -> None:
        """Compiles the step of a bucket, unless that was done before."""
        if bucket in self._compiled:
            return
        tables = StepTables.shapes(bucket.batch, bucket.max_pages)
        step = jax.jit(self._step, static_argnames="tokens", donate_argnames="cache")
        self._compiled[bucket] = step.lower(self._cache, self._stamp, tables, tokens=bucket.tokens).compile()

    def dispatch(self, message: RunStep) -> None:
        """Puts one step on the device; returns before it has run."""
        bucket = message.bucket
        self.prepare(bucket)
        tables = StepTables(
            context_lens=np.frombuffer(message.context_lens, np.int32),
            num_new=np.frombuffer(message.num_new, np.int32),
            block_tables=np.frombuffer(message.block_tables, np.int32).reshape(bucket.batch, bucket.max_pages),
        )
        self._cache, self._stamp = self._compiled[bucket](self._cache, self._stamp, tables)
        self._in_flight.append(self._stamp)

    def reap(self) -> None:
        """Forgets the steps that have run. Raises the error of one that failed."""
        while self._in_flight and self._in_flight[0].is_ready():
            self._in_flight.popleft().block_until_ready()

    def _step(self, cache: PagedCache, stamp: jax.Array, tables: StepTables, *, tokens: int):
        scales = jnp.asarray(self._config.scales, jnp.float32)
        layers = jnp.arange(len(self._config.scales), dtype=jnp.int32)

        def layer(carry, xs):
            return self._layer(*carry, *xs, tables=tables, tokens=tokens), None

        (cache, stamp), _ = jax.lax.scan(layer, (cache, next_step(stamp)), (layers, scales))
        return cache, stamp

    def _layer(self, cache: PagedCache, stamp, layer, scale, *, tables: StepTables, tokens: int):
        config = self._config
        batch = tables.context_lens.shape[0]
        q_spec = jax.ShapeDtypeStruct((batch, tokens, config.num_heads, config.head_dim), config.dtype)
        kv_spec = jax.ShapeDtypeStruct((batch, tokens, config.num_kv_heads, config.head_dim), config.dtype)

        (q,), stamp = recv(self._inbox, stamp, [q_spec], tag=Tag.Q)
        cached = self._kernel.attend_cached(q, cache, layer, tables, scale)
        (k, v), stamp = recv(self._inbox, stamp, [kv_spec, kv_spec], tag=Tag.KV)
        new = self._kernel.attend_new(q, k, v, scale)
        # XLA writes the cache in place only if it knows that every read of this layer came first; without the
        # barrier it copies the whole cache, once per layer (measured: 595 ms a step instead of 17).
        cached, k, v = jax.lax.optimization_barrier((cached, k, v))
        cache = append(cache, layer, k, v, tables)
        stamp = send(self._outbox, stamp, [merge(cached, new).output(config.dtype)], tag=Tag.ATTENDED)
        return cache, next_layer(stamp)


def main(argv: list[str]) -> None:
    del argv
    # The engine ends its workers itself; a Ctrl-C in its terminal must not end them first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    client = ControlClient(_CONTROL.value)
    _end_with(_ENGINE_PID.value, client)
    try:
        client.send(Hello(worker=_INDEX.value, pid=os.getpid()))
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
    worker: AttentionWorker | None = None
    while True:
        message = client.receive(timeout_ms=_POLL_MS)
        match message:
            case Shutdown():
                return
            case Configure():
                worker = _configure(message)
                client.send(Done())
            case Prepare() if worker is not None:
                worker.prepare(message.bucket)
                client.send(Done())
            case RunStep() if worker is not None:
                worker.dispatch(message)
            case None:
                pass
            case _:
                raise RuntimeError(f"got {type(message).__name__} before Configure")
        if worker is not None:
            worker.reap()


def _configure(message: Configure) -> AttentionWorker:
    config = message.config
    options = {"peer": "model worker", "timeout_s": config.timeout_s}
    inbox = attach(message.inbox, role="reader", **options)
    outbox = attach(message.outbox, role="writer", **options)
    return AttentionWorker(config, inbox, outbox)


def _end_with(pid: int, client: ControlClient) -> None:
    """Ends this process when process `pid` has ended, whatever the main thread is waiting for."""
    try:
        engine = os.pidfd_open(pid)
    except ProcessLookupError:
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
