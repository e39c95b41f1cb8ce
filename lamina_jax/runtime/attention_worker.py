"""The attention worker: a process that holds KV cache for its share of the heads and answers q with attention.

It decides nothing. The model worker tells it over a control connection which step comes next; the step itself is one
XLA program that reads q, k and v from a channel, keeps the cache in place, and writes the output to another channel.

Run as a program it belongs to the engine that started it, on the same host. `serve_cluster` serves the model worker of
a cluster.
"""

import contextlib
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import jax
import jax.numpy as jnp
import numpy as np
import zmq
from absl import app, flags, logging

from lamina_jax.attention.cache import PagedCache, StepTables
from lamina_jax.attention.kernels import get_kernel
from lamina_jax.runtime import timeline
from lamina_jax.runtime.attention_step import AttentionStep, message_list
from lamina_jax.runtime.control import ControlClient
from lamina_jax.runtime.control_tcp import ControlListener, Session
from lamina_jax.runtime.gpu_options import compiler_options, exact_products
from lamina_jax.runtime.kept import KeptPrograms
from lamina_jax.runtime.memory import CACHE_SHARE_OF_MEMORY, available_memory
from lamina_jax.runtime.messages import (
    AttentionWorkerConfig,
    Available,
    Bucket,
    Configure,
    Describe,
    Done,
    Failed,
    Hello,
    Prepare,
    RunStep,
    Shutdown,
    ToClusterWorker,
)
from lamina_jax.runtime.places import CACHE_SHARE_OF_GPU, device_bytes
from lamina_jax.runtime.serving import MessageError, Servant, serve
from lamina_jax.runtime.stamps import first_stamp
from lamina_jax.transport import Channel, ChannelAddress, Role, attach, first_failure
from lamina_jax.transport.recorder import start_recording

FLAGS = flags.FLAGS

_POLL_MS = 50
# The engine's waits have the deadlines, so it can say who is late, and may be stopped for a while (Ctrl-Z). Should it
# die, the channels and `_end_with` notice at once.
_PATIENCE_S = 24 * 3600.0


class AttentionWorker:
    """One worker's cache, channels and compiled steps."""

    def __init__(
        self,
        config: AttentionWorkerConfig,
        inboxes: Sequence[Channel],
        outboxes: Sequence[Channel],
        kept: KeptPrograms,
    ) -> None:
        """Args:
        config: the worker's share.
        inboxes: reading ends of q, k and v, by batch.
        outboxes: writing ends of the output, by batch.
        kept: steps that the session before has compiled.
        """
        kernel = get_kernel(config.kernel, jax.devices()[0])
        self._step = AttentionStep(config=config, kernel=kernel, inboxes=inboxes, outboxes=outboxes)
        self._channels = (*inboxes, *outboxes)
        ends = tuple(channel.in_programs for channel in self._channels)
        self._compiled: dict[tuple[Bucket, int], jax.stages.Compiled] = kept.of((config, ends))
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
        """Puts one step of some batches on the device; returns before it has run. Raises MessageError if there are no
        such batches."""
        known, asked = len(self._stamps), set(message.batches)
        if max(asked) >= known or len(asked) < len(message.batches):
            raise MessageError(f"expected different batches below {known}, got {message.batches}")
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

    def finish(self) -> None:
        """Waits for the last step dispatched. Raises as `reap`."""
        self._stamps.block_until_ready()
        if (failure := first_failure(self._channels)) is not None:
            raise failure

    def abort(self) -> None:
        """Makes the steps under way fail, and the model worker's operations on the other ends."""
        for channel in self._channels:
            channel.abort()

    def close(self) -> None:
        """Frees the channels, once no step uses them any more."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._stamps.block_until_ready()
        for channel in self._channels:
            channel.close()


class AttentionServant(Servant):
    """Obeys the model worker, whether that is on this host or another."""

    def __init__(
        self,
        send: Callable[[Any], None],
        kept: KeptPrograms,
        *,
        peer: str = "model worker",
        host: str = "127.0.0.1",
    ) -> None:
        """Args:
        send: queues a message for the model worker (`messages.FromWorker`, `messages.FromClusterWorker`).
        kept: steps that the session before has compiled.
        peer: what errors call the model worker.
        host: address of this host by which the model worker reaches it.
        """
        self._send = send
        self._kept = kept
        self._peer = peer
        self._host = host
        self._worker: AttentionWorker | None = None
        self._aborted = False

    def obey(self, message: ToClusterWorker) -> None:
        match message:
            case Describe():
                self._send(_available())
            case Configure() if self._worker is None:
                self._worker, answers = self._configure(message)
                if self._aborted:
                    self._worker.abort()
                self._send(Done(answers=answers))
            case Prepare() if self._worker is not None:
                self._worker.prepare(message.bucket, message.num_batches)
                self._send(Done())
            case RunStep() if self._worker is not None:
                self._worker.dispatch(message)
            case _:
                when = "before" if self._worker is None else "after"
                raise MessageError(f"{type(message).__name__} came {when} Configure")

    def watch(self) -> None:
        if self._worker is not None:
            self._worker.reap()

    def reason(self, error: Exception) -> str:
        return f"{type(error).__name__}: {error}"

    def finish(self) -> None:
        if self._worker is not None:
            self._worker.finish()

    def abort(self) -> None:
        self._aborted = True
        if self._worker is not None:
            self._worker.abort()

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _configure(self, message: Configure) -> tuple[AttentionWorker, tuple[ChannelAddress | None, ...]]:
        """The worker, and what the creator of its channels has to know of its ends."""
        config = message.config
        if message.messages != (own := message_list(config)):
            raise RuntimeError(
                f"{config.name} expects the messages {', '.join(own)}, the {self._peer} has "
                f"{', '.join(message.messages)}; both must run the same version of lamina_jax"
            )
        with contextlib.ExitStack() as undo:
            inboxes = [undo.enter_context(self._attached(address, "reader")) for address in message.inboxes]
            outboxes = [undo.enter_context(self._attached(address, "writer")) for address in message.outboxes]
            worker = AttentionWorker(config, inboxes, outboxes, self._kept)
            undo.pop_all()
        return worker, tuple(c.answer for c in (*inboxes, *outboxes))

    def _attached(self, address: ChannelAddress, role: Role) -> Channel:
        # Elsewhere the creator cannot reach this end.
        options = {"host": self._host} if address.kind == "tcp" else {}
        return attach(address, role=role, peer=self._peer, timeout_s=_PATIENCE_S, **options)


def serve_cluster(listener: ControlListener, *, name: str) -> None:
    """Serves model workers of a cluster, one after another, until SIGTERM.

    Args:
        listener: its messages are `messages.ToClusterWorker`.
        name: of this worker in the log, e.g. "attention worker 1".
    """
    host, kept = urlsplit(listener.address).hostname or "", KeptPrograms()

    def make(session: Session) -> AttentionServant:
        return AttentionServant(session.send, kept, peer=f"model worker on {session.peer.host}", host=host)

    serve(listener, make, name=name, waits_for="a model worker")


def run() -> None:
    """The program of a worker that belongs to an engine of this host."""
    # Not before, as scripts that import this module have flags of their own.
    flags.DEFINE_string("control", None, "ZeroMQ address of the engine's control socket.", required=True)
    flags.DEFINE_integer("index", None, "Number of this worker, from 0.", required=True)
    flags.DEFINE_integer("engine_pid", None, "The worker ends when this process does.", required=True)
    app.run(_main)


def _main(argv: list[str]) -> None:
    del argv
    # The engine ends its workers itself; a Ctrl-C in its terminal must not end them first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    client = ControlClient(FLAGS.control)
    _end_with(FLAGS.engine_pid, client)
    try:
        client.send(Hello(worker=FLAGS.index, device_bytes=device_bytes(jax.devices()[0])))
        _serve(client)
    except Exception as error:
        logging.info("attention worker %d failed", FLAGS.index, exc_info=True)
        client.send(Failed(message=f"{type(error).__name__}: {error}"))
        client.close()
        # Skips the wait of a normal exit for programs that may still sit in a channel.
        os._exit(1)
    client.close()
    os._exit(0)


def _serve(client: ControlClient) -> None:
    servant = AttentionServant(client.send, KeptPrograms())
    with contextlib.ExitStack() as at_end:
        while not isinstance(message := client.receive(timeout_ms=_POLL_MS), Shutdown):
            if message is not None:
                servant.obey(message)
            if isinstance(message, Configure):
                _record(message.config, at_end)
            servant.watch()


def _available() -> Available:
    device = jax.devices()[0]
    limit = device_bytes(device)
    if limit is None:
        return Available(platform="cpu", cache_bytes=int(CACHE_SHARE_OF_MEMORY * available_memory()))
    return Available(platform="cuda", cache_bytes=int(CACHE_SHARE_OF_GPU * limit))


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
    run()
