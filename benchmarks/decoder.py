"""Engines that decode with the cache already full, for benchmarks: steps planned as `LLM` does, without prompts."""

import contextlib
import dataclasses
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import psutil
from flax import nnx
from jax.sharding import SingleDeviceSharding

from lamina_jax import SamplingParams
from lamina_jax.attention.kernels import KernelTarget, choose_kernel
from lamina_jax.engine.scheduler import Scheduler, SchedulerLimits, SequenceState
from lamina_jax.models import ModelConfig
from lamina_jax.models.checkpoint import abstract_model
from lamina_jax.runtime.executor import CacheConfig, Executor, UnsplitExecutor
from lamina_jax.runtime.model import Model
from lamina_jax.runtime.model_worker import ModelWorker, model_function
from lamina_jax.runtime.places import attention_environments, channel_kind
from lamina_jax.runtime.plan import StepPlan
from lamina_jax.runtime.pool import AttentionWorkerPool
from lamina_jax.runtime.split import SplitExecutor

_STEPS_AHEAD = 1


@dataclasses.dataclass(frozen=True)
class Kind:
    """An engine to measure; `num_batches` None is the unsplit model."""

    name: str
    num_batches: int | None = None
    overlap: bool = True
    attention_platform: str = "cpu"
    """Of the one worker of a split model."""
    attention_kernel: str = "xla"
    """As `LLM` takes it."""
    page_size: int = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Burst:
    """Steps dispatched one after another, without a look at what they sampled."""

    plan_s: float
    """Seconds of the host for planning, per step."""
    dispatch_s: float
    """Seconds of the host until a step was dispatched, per step."""
    step_s: float
    """Seconds from the first dispatch until all had run, per step."""


class Decoder:
    """`batch` sequences with `context` tokens in the cache, about to decode `num_steps` more."""

    def __init__(
        self, model: Model, kind: Kind, *, batch: int, context: int, num_steps: int, trace_dir: str | None = None
    ) -> None:
        pages = -(-context // kind.page_size)
        self._limits = SchedulerLimits.of(
            max_num_seqs=batch,
            max_prefill_tokens=1,
            page_size=kind.page_size,
            num_pages=pages * batch,
            num_batches=kind.num_batches or 1,
            min_batch_seqs=1,
        )
        others = set(psutil.Process().children())
        self._executor = _executor(model, kind, self._limits, trace_dir)
        self._workers = [process.pid for process in set(psutil.Process().children()) - others]
        self._worker = ModelWorker(self._executor, num_slots=batch, num_batches=self._limits.num_batches)
        self._scheduler = Scheduler(self._limits)
        params = SamplingParams(temperature=0.0)
        for i in range(batch):
            # Ends at `context`, so that all steps are of one bucket.
            sequence = SequenceState(
                prompt_token_ids=[0] * (context - num_steps), params=params, seed=i, index=0, max_new_tokens=num_steps
            )
            sequence.num_computed = sequence.num_prompt_tokens
            self._scheduler.add(sequence)

    @contextlib.contextmanager
    def on_cores(self, cores: str) -> Iterator[None]:
        """Keeps the workers to a core each if `cores` is "own" and there are any."""
        if cores == "shared" or not self._workers:
            yield
            return
        everywhere = os.sched_getaffinity(0)
        first, second = sorted(everywhere)[:2]
        _pin(os.getpid(), {first})
        for pid in self._workers:
            _pin(pid, {second})
        try:
            yield
        finally:
            for pid in (os.getpid(), *self._workers):
                _pin(pid, everywhere)

    def run(self, num_steps: int) -> float:
        """Seconds of so many steps."""
        start = time.perf_counter()
        in_flight: deque[list[jax.Array]] = deque()
        for _ in range(num_steps):
            in_flight.append(self.dispatch(self.plan()))
            if len(in_flight) > _STEPS_AHEAD:
                read(in_flight.popleft())
        while in_flight:
            read(in_flight.popleft())
        seconds = time.perf_counter() - start
        self._executor.check()
        return seconds

    def burst(self, num_steps: int) -> Burst:
        """What so many steps cost the host, and how long they take."""
        start = time.perf_counter()
        planning, steps = 0.0, []
        for _ in range(num_steps):
            before = time.perf_counter()
            plans = self.plan()
            planning += time.perf_counter() - before
            steps.append(self.dispatch(plans))
        dispatched = time.perf_counter()
        for tokens in steps:
            read(tokens)
        ended = time.perf_counter()
        self._executor.check()
        return Burst(
            plan_s=planning / num_steps,
            dispatch_s=(dispatched - start - planning) / num_steps,
            step_s=(ended - start) / num_steps,
        )

    def plan(self) -> list[StepPlan]:
        """The next step of each batch."""
        return [step.plan for step in self._scheduler.plan()]

    def dispatch(self, plans: list[StepPlan]) -> list[jax.Array]:
        """The tokens that a step samples, by batch; they are not there yet."""
        self._worker.prepare(plans[0].bucket, len(plans))
        return self._worker.run(plans)

    def close(self) -> None:
        """Ends the workers."""
        self._executor.close()


def random_model(config: ModelConfig, *, dtype: str) -> Model:
    """A model whose weights are random numbers, made where JAX computes by default: no checkpoint, nothing copied."""
    graph, abstract = abstract_model(config, dtype=dtype)
    leaves, tree = jax.tree.flatten(abstract)
    draw = jax.jit(lambda key, shape, dtype: 0.02 * jax.random.normal(key, shape, dtype), static_argnums=(1, 2))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [draw(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return Model(*model_function(nnx.merge(graph, jax.tree.unflatten(tree, drawn))))


def read(tokens: list[jax.Array]) -> None:
    """Waits for tokens and copies them to the host."""
    for each in tokens:
        np.asarray(each)


def _executor(model: Model, kind: Kind, limits: SchedulerLimits, trace_dir: str | None) -> Executor:
    kv, platform = model.sites[0].kv, "cuda" if model.device.platform == "gpu" else "cpu"
    on_cpu = kind.num_batches is not None and kind.attention_platform == "cpu"
    device = jax.local_devices(backend="cpu")[0] if on_cpu else model.device
    target = KernelTarget.of_device(device, dtype=kv.dtype.name, head_dim=kv.shape[3], page_size=limits.page_size)
    cache = CacheConfig(
        page_size=limits.page_size,
        num_pages=limits.num_pages,
        kernel=choose_kernel(kind.attention_kernel, target),
    )
    if kind.num_batches is None:
        return UnsplitExecutor(model, cache)
    environments = attention_environments(
        kind.attention_platform,
        num_workers=1,
        num_model_gpus=int(platform == "cuda"),
        num_gpus=len(jax.devices()) if platform == "cuda" else 0,
        memory_fraction=None,
    )
    pool = AttentionWorkerPool(environments)
    try:
        return SplitExecutor(
            model,
            cache,
            pool,
            num_batches=kind.num_batches,
            replicas=[SingleDeviceSharding(model.device)],
            channel_kinds=[channel_kind(platform, kind.attention_platform)],
            overlap=kind.overlap,
            max_step_tokens=limits.max_step_tokens,
            timeout_s=120.0,
            trace_dir=trace_dir,
        )
    except BaseException:
        pool.close()
        raise


def _pin(pid: int, cores: set[int]) -> None:
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cores)
