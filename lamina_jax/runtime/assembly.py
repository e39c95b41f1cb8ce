"""How a model worker is put together: its share of GPUs, its weights, room for the KV cache, its executor."""

import os
from collections.abc import Sequence

import jax
from jax.sharding import Sharding

from lamina_jax.attention.kernels import KernelTarget, choose_kernel
from lamina_jax.models import ModelConfig
from lamina_jax.runtime.executor import CacheConfig, Executor, UnsplitExecutor
from lamina_jax.runtime.messages import ExecutorSettings, ModelFacts, Placement
from lamina_jax.runtime.model import Model
from lamina_jax.runtime.model_worker import ModelWorker
from lamina_jax.runtime.places import CACHE_SHARE_OF_GPU, device_bytes, model_memory_fraction, model_places
from lamina_jax.runtime.pool import AttentionWorkers
from lamina_jax.runtime.split import SplitExecutor


def model_facts(config: ModelConfig) -> ModelFacts:
    """What engine and model worker compare of a model."""
    return ModelFacts(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        dtype=config.dtype,
    )


def claim_gpus(placement: Placement, *, num_local_workers: int) -> int:
    """Limits what this process takes of its GPUs' memory, before JAX does; returns how many GPUs it sees.

    Args:
        num_local_workers: attention workers that share this host's GPUs with the model.
    """
    if placement.model_platform == "cpu":
        return 0
    # Imported late: only a model on a GPU needs the custom calls of CUDA.
    from lamina_jax.transport.cuda import cuda_device_count

    num_gpus = cuda_device_count()
    fraction = placement.model_memory_fraction or model_memory_fraction(
        num_workers=num_local_workers if placement.attention_platform == "cuda" else 0,
        num_model_gpus=placement.num_model_gpus,
        num_gpus=num_gpus,
    )
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{fraction:.3f}"
    return num_gpus


def places_of(placement: Placement) -> list[Sharding]:
    """Where each replica of the model lies; raises ValueError as `model_places` does."""
    return model_places(
        placement.model_platform,
        num_replicas=placement.num_replicas,
        tensor_parallel_size=placement.tensor_parallel_size,
    )


def cache_bytes(
    placement: Placement, model: ModelConfig, workers: AttentionWorkers | None, place: Sharding
) -> int | None:
    """What there is for the whole KV cache; None where it lies in this host's memory.

    Args:
        workers: None for a model that runs whole.
        place: of the model.

    Raises:
        WorkerError: a worker does not say how much memory it has.
    """
    if workers is None:
        (device,) = place.device_set
        limit = device_bytes(device)
        return limit and int(CACHE_SHARE_OF_GPU * (limit - device.memory_stats()["bytes_in_use"]))
    smallest = workers.cache_bytes()
    # All workers have as many pages, so the one with the most heads decides.
    most_heads = -(-model.num_kv_heads // placement.num_attention_workers)
    return smallest and smallest * model.num_kv_heads // most_heads


def make_worker(
    model: Model,
    workers: AttentionWorkers | None,
    places: Sequence[Sharding],
    channel_kinds: Sequence[str],
    settings: ExecutorSettings,
) -> ModelWorker:
    """The model worker, ready to prepare and run steps.

    Args:
        workers: None to run the model whole; otherwise closed with the model worker.
        places: of each replica.
        channel_kinds: of the channels to each attention worker.

    Raises:
        ValueError: a setting does not fit the model.
        WorkerError: an attention worker does not do what it is asked.
    """
    executor = _make_executor(model, workers, places, channel_kinds, settings)
    return ModelWorker(executor, num_slots=settings.max_num_seqs, num_batches=settings.num_batches)


def _make_executor(
    model: Model,
    workers: AttentionWorkers | None,
    places: Sequence[Sharding],
    channel_kinds: Sequence[str],
    settings: ExecutorSettings,
) -> Executor:
    kv = model.sites[0].kv
    # GPUs are taken to be of one kind: no attention worker's is at hand here.
    on_cpu = workers is not None and settings.attention_platform == "cpu"
    device = jax.local_devices(backend="cpu" if on_cpu else None)[0]
    target = KernelTarget.of_device(
        device,
        dtype=kv.dtype.name,
        kv_cache_dtype=settings.kv_cache_dtype,
        head_dim=kv.shape[3],
        page_size=settings.page_size,
    )
    cache = CacheConfig(
        page_size=settings.page_size,
        num_pages=settings.num_pages,
        kernel=choose_kernel(settings.attention_kernel, target),
        dtype=settings.kv_cache_dtype,
    )
    if workers is None:
        return UnsplitExecutor(model, cache)
    return SplitExecutor(
        model,
        cache,
        workers,
        num_batches=settings.num_batches,
        replicas=places,
        channel_kinds=channel_kinds,
        overlap=settings.overlap,
        trace_dir=settings.trace_dir,
        max_step_tokens=settings.max_step_tokens,
        timeout_s=settings.timeout_s,
    )
