"""The model worker of a cluster: a process that obeys an engine, and has attention workers obey it."""

import dataclasses
import gc
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jax.sharding import Sharding

from lamina_jax.models import ModelConfig
from lamina_jax.runtime.assembly import cache_bytes, claim_gpus, make_worker, model_facts, places_of
from lamina_jax.runtime.cluster_key import ClusterKey
from lamina_jax.runtime.cluster_workers import ClusterWorkers
from lamina_jax.runtime.control_tcp import ControlListener, PeerInfo, Session
from lamina_jax.runtime.errors import WorkerError
from lamina_jax.runtime.loading import load
from lamina_jax.runtime.messages import (
    Done,
    FromModelWorker,
    Loaded,
    LoadModel,
    MakeExecutor,
    ModelFacts,
    Prepare,
    RunPlans,
    Sampled,
    ToModelWorker,
    Waiting,
)
from lamina_jax.runtime.model import Model
from lamina_jax.runtime.model_worker import ModelWorker
from lamina_jax.runtime.plan import StepPlan, decode_plan
from lamina_jax.runtime.serving import MessageError, Servant, serve


def serve_model(listener: ControlListener, key: ClusterKey | None, info: PeerInfo) -> None:
    """Serves engines, one after another, until SIGTERM.

    Args:
        listener: its messages are `messages.ToModelWorker`.
        key: for the links to the attention workers.
        info: of this process.
    """
    weights = _Weights()

    def make(session: Session) -> ModelServant:
        return ModelServant(session.send, key, info, weights)

    serve(listener, make, name="model worker", waits_for="an engine")


class _Weights:
    """The model loaded last, which engines that come and go need not read again."""

    def __init__(self) -> None:
        self._key: Any = None
        self._model: Model | None = None

    def get(self, directory: Path, dtype: str, places: Sequence[Sharding]) -> Model:
        """Raises as `loading.load` does."""
        files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in directory.iterdir())
        key = (directory, files, dtype, places[0])
        if key != self._key or self._model is None:
            # Before the next model is there: two need not fit. A model remembers its own method, which is a cycle.
            self._model = None
            gc.collect()
            self._model = load(directory, dtype=dtype, place=places[0])
            self._key = key
        return self._model


@dataclasses.dataclass(frozen=True)
class _Loaded:
    model: Model
    places: Sequence[Sharding]
    channel_kinds: Sequence[str]


class ModelServant(Servant):
    """Loads a model and runs its steps for one engine."""

    def __init__(
        self, send: Callable[[FromModelWorker], None], key: ClusterKey | None, info: PeerInfo, weights: _Weights
    ) -> None:
        """Args:
        send: queues a message for the engine.
        key, info: as for `serve_model`.
        weights: kept between sessions.
        """
        self._send = send
        self._key = key
        self._info = info
        self._weights = weights
        self._workers: ClusterWorkers | None = None
        self._loaded: _Loaded | None = None
        self._worker: ModelWorker | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reads tokens")
        self._unread: deque[Future[None]] = deque()

    def obey(self, message: ToModelWorker) -> None:
        match message:
            case LoadModel() if self._loaded is None:
                self._loaded = self._load(message)
            case MakeExecutor() if self._loaded is not None and self._worker is None:
                loaded = self._loaded
                self._worker = make_worker(
                    loaded.model, self._workers, loaded.places, loaded.channel_kinds, message.settings
                )
                self._send(Done())
            case Prepare() if self._worker is not None:
                self._worker.prepare(message.bucket, message.num_batches)
                self._send(Done())
            case RunPlans() if self._worker is not None:
                tokens = self._worker.run(_plans(message))
                # Steps are dispatched ahead of the tokens of those before them.
                self._unread.append(self._reader.submit(self._read, self._worker, message.step, tokens))
            case _:
                raise MessageError(f"{type(message).__name__} came out of turn")

    def watch(self) -> None:
        while self._unread and self._unread[0].done():
            self._unread.popleft().result()
        if self._worker is not None:
            self._worker.check()
        elif self._workers is not None:
            self._workers.check()

    def reason(self, error: Exception) -> str:
        shown = self._worker.explain(error) if self._worker is not None else error
        return str(shown) if isinstance(shown, WorkerError) else f"{type(shown).__name__}: {shown}"

    def finish(self) -> None:
        for unread in list(self._unread):
            unread.result()

    def abort(self) -> None:
        if self._worker is not None:
            self._worker.close()
        elif self._workers is not None:
            self._workers.close()

    def close(self) -> None:
        # Again: this waits for the slices that were dispatched meanwhile, whose channels' numbers are free from now on.
        self.abort()
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _load(self, message: LoadModel) -> _Loaded:
        directory, placement = Path(message.directory), message.placement
        config = self._checked_config(directory, message.facts)
        claim_gpus(placement, num_local_workers=0)
        places = places_of(placement)
        self._workers = ClusterWorkers(
            message.attention_workers,
            self._key,
            self._info,
            timeout_s=message.start_timeout_s,
            on_waiting=lambda what: self._send(Waiting(what)),
        )
        chosen = self._workers.choose_channels(placement, message.transport)
        channels = tuple(f"{n}: {kind}, {why}" for n, (kind, why) in zip(self._workers.names(), chosen, strict=True))
        for line in channels:
            logging.info(line)
        model = self._weights.get(directory, message.dtype, places)
        self._send(
            Loaded(
                kv_dtype=model.sites[0].kv.dtype.name,
                cache_bytes=cache_bytes(placement, config, self._workers, places[0]) or 0,
                channels=channels,
            )
        )
        return _Loaded(model, places, [kind for kind, _ in chosen])

    def _checked_config(self, directory: Path, expected: ModelFacts) -> ModelConfig:
        config = ModelConfig.from_file(directory / "config.json")
        own = model_facts(config)
        different = [name for name in own.__struct_fields__ if getattr(own, name) != getattr(expected, name)]
        if different:
            engine, worker = (", ".join(f"{n} {getattr(f, n)}" for n in different) for f in (expected, own))
            raise WorkerError(
                f"the model in {directory} is not the engine's: there it has {engine}, on {self._info.host} it has "
                f"{worker}."
            )
        return config

    def _read(self, worker: ModelWorker, step: int, tokens: Sequence[Any]) -> None:
        """Waits for a step's tokens and sends them."""
        read = tuple(np.asarray(each).tobytes() for each in tokens)
        worker.check()
        self._send(Sampled(step, read))


def _plans(message: RunPlans) -> list[StepPlan]:
    try:
        return [decode_plan(batch) for batch in message.batches]
    except ValueError as error:
        raise MessageError(f"a plan of step {message.step} does not fit its bucket: {error}") from error
