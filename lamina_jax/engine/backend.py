"""Where the model worker of an `LLM` is: in this process, with attention workers that it starts, or in a cluster."""

import abc
import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from absl import logging
from jax.sharding import Sharding
from jaxtyping import DTypeLike

from lamina_jax.engine.config import EngineConfig
from lamina_jax.models import ModelConfig
from lamina_jax.runtime.assembly import cache_bytes, claim_gpus, make_worker, model_facts, places_of
from lamina_jax.runtime.cluster import Cluster
from lamina_jax.runtime.cluster_key import load_key_file
from lamina_jax.runtime.control_tcp import ControlLink
from lamina_jax.runtime.control_wire import peer_info
from lamina_jax.runtime.loading import load
from lamina_jax.runtime.messages import ExecutorSettings, FromModelWorker, Loaded, LoadModel
from lamina_jax.runtime.model import Model
from lamina_jax.runtime.model_worker import ModelWorker, StepRunner
from lamina_jax.runtime.places import attention_environments, channel_kind
from lamina_jax.runtime.pool import AttentionWorkerPool
from lamina_jax.runtime.remote_model import RemoteModelWorker, load_remotely, make_remotely


class LoadedModel(abc.ABC):
    """A model whose weights are read, before it is known how large its KV cache is.

    Attributes:
        kv_dtype: of its keys and values.
        cache_bytes: what there is for the KV cache; None where it lies in this host's memory.
    """

    def __init__(self, *, kv_dtype: DTypeLike, cache_bytes: int | None) -> None:
        self.kv_dtype = kv_dtype
        self.cache_bytes = cache_bytes

    @abc.abstractmethod
    def make_worker(self, settings: ExecutorSettings) -> StepRunner:
        """The model worker, which from now on has all that this has.

        Raises:
            ValueError: a setting does not fit the model.
            WorkerError: a worker does not do what it is asked.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Frees all that this has, if no model worker was made."""


class Backend(abc.ABC):
    """Makes model workers."""

    @abc.abstractmethod
    def load(self) -> LoadedModel:
        """Reads a model's weights.

        Raises:
            ValueError: a setting does not fit the model or the machine.
            CheckpointError: the model cannot be read.
            WorkerError: a worker does not come.
        """


@dataclasses.dataclass(frozen=True)
class LocalBackend(Backend):
    """In this process, with attention workers that it starts."""

    directory: Path
    model_config: ModelConfig
    config: EngineConfig

    def load(self) -> LoadedModel:
        placement = self.config.placement
        num_gpus = claim_gpus(placement, num_local_workers=placement.num_attention_workers)
        places = places_of(placement)
        with contextlib.ExitStack() as undo:
            # Workers start up while the weights are read.
            pool = None
            if placement.num_attention_workers:
                environments = attention_environments(
                    placement.attention_platform,
                    num_workers=placement.num_attention_workers,
                    num_model_gpus=placement.num_model_gpus,
                    num_gpus=num_gpus,
                    memory_fraction=self.config.attention_memory_fraction,
                )
                pool = AttentionWorkerPool(environments)
                undo.callback(pool.close)
            model = load(self.directory, dtype=self.config.dtype, place=places[0])
            on_this_host = pool is not None and placement.attention_platform == "cpu"
            room = None if on_this_host else cache_bytes(placement, self.model_config, pool, places[0])
            undo.pop_all()
        kind = channel_kind(placement.model_platform, placement.attention_platform, self.config.transport)
        return _LocalModel(model, pool, places, [kind] * placement.num_attention_workers, room)


class _LocalModel(LoadedModel):
    def __init__(
        self,
        model: Model,
        pool: AttentionWorkerPool | None,
        places: Sequence[Sharding],
        channel_kinds: Sequence[str],
        cache_bytes: int | None,
    ) -> None:
        super().__init__(kv_dtype=model.sites[0].kv.dtype, cache_bytes=cache_bytes)
        self._model = model
        self._pool = pool
        self._places = places
        self._channel_kinds = channel_kinds

    def make_worker(self, settings: ExecutorSettings) -> ModelWorker:
        return make_worker(self._model, self._pool, self._places, self._channel_kinds, settings)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


@dataclasses.dataclass(frozen=True)
class ClusterBackend(Backend):
    """In a process of a cluster, as are the attention workers."""

    cluster: Cluster
    directory: Path
    model_config: ModelConfig
    config: EngineConfig

    def load(self) -> LoadedModel:
        key = load_key_file(self.cluster.key_file) if self.cluster.key_file else None
        link = ControlLink(self.cluster.model_worker, key, FromModelWorker, "model worker", peer_info())
        request = LoadModel(
            directory=str(self.directory.absolute()),
            facts=model_facts(self.model_config),
            dtype=self.config.dtype,
            placement=self.config.placement,
            attention_workers=self.cluster.attention_workers,
            transport=self.cluster.transport,
            start_timeout_s=self.config.start_timeout_s,
        )
        try:
            link.open(self.config.start_timeout_s, lambda what: logging.warning("waiting for the %s", what))
            loaded = load_remotely(link, request)
        except BaseException:
            link.close()
            raise
        for channel in loaded.channels:
            logging.info(channel)
        return _ClusterModel(link, loaded)


class _ClusterModel(LoadedModel):
    def __init__(self, link: ControlLink, loaded: Loaded) -> None:
        super().__init__(kv_dtype=loaded.kv_dtype, cache_bytes=loaded.cache_bytes)
        self._link = link

    def make_worker(self, settings: ExecutorSettings) -> RemoteModelWorker:
        return make_remotely(self._link, settings)

    def close(self) -> None:
        self._link.close()
