"""How the forward pass of a step is run: whole (`UnsplitExecutor`), or cut at its attends (`SplitExecutor`)."""

import abc
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lamina_jax import partition
from lamina_jax.attention.cache import PagedCache, StepTables, append
from lamina_jax.attention.kernels import get_kernel
from lamina_jax.attention.merge import merge
from lamina_jax.runtime.messages import AttentionWorkerConfig, Bucket, Configure, RunStep
from lamina_jax.runtime.plan import StepPlan
from lamina_jax.runtime.pool import AttentionWorkerPool
from lamina_jax.runtime.stamps import first_stamp, next_layer, next_step
from lamina_jax.transport import Channel, MessageSpec, Tag, channel_class, recv, send

ModelFunction = Callable[..., Sequence[jax.Array]]
"""``f(params, tokens [B, T], positions [B, T], logit_index [B]) -> (logits [B, vocab],)``, calling `attend`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The KV cache that the attention side keeps."""

    page_size: int
    """Tokens in a page."""
    num_pages: int
    """Pages of a pool; every worker has a pool of so many for its heads."""
    kernel: str
    """Name in `lamina_jax.attention.kernels.KERNELS`."""


class Model:
    """A model function with its weights, traced on demand for the shapes of a step."""

    def __init__(self, fn: ModelFunction, params: Any) -> None:
        self._fn = fn
        self.params: list[jax.Array] = jax.tree.leaves(params)
        self._tree = jax.tree.structure(params)
        self._traced = functools.cache(self._trace)

    def traced(self, batch: int, tokens: int) -> partition.Traced:
        """The model on `batch` sequences of `tokens` new tokens each."""
        return self._traced(batch, tokens)

    @functools.cached_property
    def sites(self) -> tuple[partition.AttendSite, ...]:
        """The attends, for a step of one token."""
        return partition.cut(self.traced(1, 1)).sites

    def _trace(self, batch: int, tokens: int) -> partition.Traced:
        params = [jax.ShapeDtypeStruct(p.shape, p.dtype) for p in self.params]
        return partition.trace(self._fn, jax.tree.unflatten(self._tree, params), *_input_shapes(batch, tokens))


class Executor(abc.ABC):
    """Runs forward passes, one after another, on a device."""

    @abc.abstractmethod
    def prepare(self, bucket: Bucket) -> None:
        """Compiles all that a step of this bucket needs, here and in the workers; quick if done before.

        Raises WorkerError if a worker fails."""

    @abc.abstractmethod
    def forward(self, plan: StepPlan, tokens: jax.Array | np.ndarray) -> Float[Array, "batch vocab"]:
        """Dispatches the forward pass of a prepared bucket on ``tokens`` [batch, tokens]; does not wait for it."""

    @abc.abstractmethod
    def check(self) -> None:
        """Raises WorkerError if a worker is known to have failed."""

    @abc.abstractmethod
    def explain(self, error: Exception) -> Exception:
        """The exception to show the user for one that came out of a dispatched step."""

    @abc.abstractmethod
    def close(self) -> None:
        """Ends workers and frees channels; what is still running fails. May be called twice."""


class UnsplitExecutor(Executor):
    """The whole model as one program with its attention inside: no workers. The oracle of the split run."""

    def __init__(self, model: Model, config: CacheConfig) -> None:
        site = model.sites[0]
        self._model = model
        self._kernel = get_kernel(config.kernel)
        self._cache = PagedCache.zeros(
            num_layers=len(model.sites),
            num_pages=config.num_pages,
            num_kv_heads=site.kv.shape[2],
            page_size=config.page_size,
            head_dim=site.kv.shape[3],
            dtype=site.kv.dtype,
        )
        self._compiled: dict[Bucket, jax.stages.Compiled] = {}

    def prepare(self, bucket: Bucket) -> None:
        if bucket in self._compiled:
            return
        traced = self._model.traced(bucket.batch, bucket.tokens)
        inputs = _input_shapes(bucket.batch, bucket.tokens)
        step = jax.jit(functools.partial(self._step, traced), donate_argnums=0)
        self._compiled[bucket] = step.lower(
            self._cache, self._model.params, inputs, StepTables.shapes(bucket.batch, bucket.max_pages)
        ).compile()

    def forward(self, plan: StepPlan, tokens) -> Array:
        inputs = (tokens, plan.positions, plan.logit_index)
        step = self._compiled[plan.bucket]
        self._cache, logits = step(self._cache, self._model.params, inputs, _tables(plan))
        return logits

    def check(self) -> None:
        pass

    def explain(self, error: Exception) -> Exception:
        return error

    def close(self) -> None:
        pass

    def _step(self, traced: partition.Traced, cache: PagedCache, params, inputs, tables: StepTables):
        def attend(layer: int, q, k, v, *, scale: float):
            nonlocal cache
            index, scale_ = jnp.int32(layer), jnp.float32(scale)
            cached = self._kernel.attend_cached(q, cache, index, tables, scale_)
            new = self._kernel.attend_new(q, k, v, scale_)
            # Reads before writes, or XLA copies the cache.
            cached, k, v = jax.lax.optimization_barrier((cached, k, v))
            cache = append(cache, index, k, v, tables)
            return merge(cached, new).output(q.dtype)

        (logits,) = partition.unsplit(traced, [*params, *inputs], attend)
        return cache, logits


@dataclasses.dataclass(frozen=True)
class _Heads:
    """One worker's contiguous share of the heads."""

    q: slice
    kv: slice


class _SlicedModel:
    """The slices of one (batch, tokens) shape, compiled."""

    def __init__(self, parts: partition.Partition, weights: list[jax.Array], compile_program: Callable) -> None:
        self._slices = parts.slices
        self._outputs = parts.outputs
        self._programs = [compile_program(p) for p in parts.programs]
        self._weights = [tuple(weights[i] for i in s.weights) for s in parts.slices]

    def run(self, inputs: Sequence[jax.Array | np.ndarray], stamp: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """Dispatches all slices in order; returns the model's outputs and the stamp."""
        values: dict[int, Any] = dict(enumerate(inputs))
        for step, weights in zip(self._slices, self._weights, strict=True):
            reads = tuple(values[i] for i in step.reads)
            writes, stamp = self._programs[step.program](weights, reads, stamp)
            values.update(zip(step.writes, writes, strict=True))
            for i in step.drops:
                del values[i]
        return [values[i] for i in self._outputs], stamp


class SplitExecutor(Executor):
    """The model's slices here, its attention in the workers of a pool, channels between."""

    def __init__(
        self, model: Model, config: CacheConfig, pool: AttentionWorkerPool, *, max_step_tokens: int, timeout_s: float
    ) -> None:
        """Args:
            max_step_tokens: largest batch x tokens of any bucket; sizes the channels.
            timeout_s: longest wait for one message, in seconds.

        Raises:
            ValueError: there are more workers than KV heads, or the layers differ in shape.
            WorkerError: a worker did not start.
        """
        self._model = model
        self._pool = pool
        self._stamp = first_stamp()
        self._prepared: set[Bucket] = set()
        self._sliced: dict[tuple[int, int], _SlicedModel] = {}
        site = model.sites[0]
        self._shares = split_heads(site.q.shape[2], site.kv.shape[2], len(pool.names()))
        self._down: list[Channel] = []
        self._up: list[Channel] = []
        for name, share in zip(pool.names(), self._shares, strict=True):
            self._open_channels(name, share, max_step_tokens, timeout_s)
        pool.configure([self._configuration(config, i, timeout_s) for i in range(len(self._shares))])

    def prepare(self, bucket: Bucket) -> None:
        if bucket in self._prepared:
            return
        self._pool.prepare(bucket)
        shape = (bucket.batch, bucket.tokens)
        if shape not in self._sliced:
            traced = self._model.traced(*shape)
            weights = [*self._model.params, *map(jnp.asarray, traced.consts)]
            self._sliced[shape] = _SlicedModel(partition.cut(traced), weights, functools.partial(self._compile, shape))
        self._pool.wait_done()
        self._prepared.add(bucket)

    def forward(self, plan: StepPlan, tokens) -> Array:
        # First the workers, then the slices: a slice may run, and wait for its answer, as it is dispatched.
        self._pool.run_step(
            RunStep(
                bucket=plan.bucket,
                context_lens=plan.context_lens.tobytes(),
                num_new=plan.num_new.tobytes(),
                block_tables=plan.block_tables.tobytes(),
            )
        )
        sliced = self._sliced[plan.bucket.batch, plan.bucket.tokens]
        (logits,), self._stamp = sliced.run((tokens, plan.positions, plan.logit_index), self._stamp)
        return logits

    def check(self) -> None:
        self._pool.check()

    def explain(self, error: Exception) -> Exception:
        failure = next((e for c in (*self._up, *self._down) if (e := c.error()) is not None), None)
        return error if failure is None else self._pool.explain(failure)

    def close(self) -> None:
        for channel in (*self._down, *self._up):
            channel.abort()
        self._pool.close()
        for channel in (*self._down, *self._up):
            channel.close()

    def _open_channels(self, name: str, share: _Heads, max_step_tokens: int, timeout_s: float) -> None:
        q, kv = self._message_shapes(share, 1, max_step_tokens)
        options = {"peer": name, "timeout_s": timeout_s}
        requests = [MessageSpec(tag=Tag.Q, tensors=(q,)), MessageSpec(tag=Tag.KV, tensors=(kv, kv))]
        answers = [MessageSpec(tag=Tag.ATTENDED, tensors=(q,))]
        shm = channel_class("shm")
        self._down.append(shm.create(role="writer", messages=requests, **options))
        self._up.append(shm.create(role="reader", messages=answers, **options))

    def _message_shapes(self, share: _Heads, batch: int, tokens: int):
        site = self._model.sites[0]
        q = jax.ShapeDtypeStruct((batch, tokens, share.q.stop - share.q.start, site.q.shape[3]), site.q.dtype)
        kv = jax.ShapeDtypeStruct((batch, tokens, share.kv.stop - share.kv.start, site.kv.shape[3]), site.kv.dtype)
        return q, kv

    def _configuration(self, config: CacheConfig, worker: int, timeout_s: float) -> Configure:
        site, share = self._model.sites[0], self._shares[worker]
        return Configure(
            config=AttentionWorkerConfig(
                name=self._pool.names()[worker],
                scales=tuple(s.scale for s in self._model.sites),
                num_heads=share.q.stop - share.q.start,
                num_kv_heads=share.kv.stop - share.kv.start,
                head_dim=site.kv.shape[3],
                dtype=str(site.kv.dtype),
                page_size=config.page_size,
                num_pages=config.num_pages,
                kernel=config.kernel,
                timeout_s=timeout_s,
            ),
            inbox=self._down[worker].address,
            outbox=self._up[worker].address,
        )

    def _compile(self, shape: tuple[int, int], program: partition.SliceProgram) -> jax.stages.Compiled:
        specs = lambda variables: tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in variables)  # noqa: E731
        run = jax.jit(functools.partial(self._run_slice, shape, program))
        return run.lower(specs(program.weights), specs(program.reads), first_stamp()).compile()

    def _run_slice(self, shape: tuple[int, int], program: partition.SliceProgram, weights, reads, stamp):
        attended = None
        if program.attended is None:
            stamp = next_step(stamp)
        else:
            attended, stamp = self._recv_attended(shape, stamp)
            stamp = next_layer(stamp)

        def send_q(q: jax.Array) -> None:
            nonlocal stamp
            for channel, share in zip(self._down, self._shares, strict=True):
                stamp = send(channel, stamp, [q[:, :, share.q]], tag=Tag.Q)

        def send_kv(k: jax.Array, v: jax.Array) -> None:
            nonlocal stamp
            for channel, share in zip(self._down, self._shares, strict=True):
                stamp = send(channel, stamp, [k[:, :, share.kv], v[:, :, share.kv]], tag=Tag.KV)

        return program.run(weights, reads, attended, send_q=send_q, send_kv=send_kv), stamp

    def _recv_attended(self, shape: tuple[int, int], stamp):
        parts = []
        for channel, share in zip(self._up, self._shares, strict=True):
            spec, _ = self._message_shapes(share, *shape)
            (part,), stamp = recv(channel, stamp, [spec], tag=Tag.ATTENDED)
            parts.append(part)
        return jnp.concatenate(parts, axis=2), stamp


def split_heads(num_heads: int, num_kv_heads: int, num_workers: int) -> list[_Heads]:
    """Contiguous shares of the KV heads, and the query heads that read them, as even as they go.

    Raises:
        ValueError: there are more workers than KV heads.
    """
    if num_workers > num_kv_heads:
        raise ValueError(
            f"num_attention_workers is {num_workers}, but the model has only {num_kv_heads} KV heads to divide; "
            f"use at most {num_kv_heads} attention workers."
        )
    group = num_heads // num_kv_heads
    bounds = [worker * num_kv_heads // num_workers for worker in range(num_workers + 1)]
    return [_Heads(slice(a * group, b * group), slice(a, b)) for a, b in itertools.pairwise(bounds)]


def _input_shapes(batch: int, tokens: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (
        jax.ShapeDtypeStruct((batch, tokens), jnp.int32),
        jax.ShapeDtypeStruct((batch, tokens), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )


def _tables(plan: StepPlan) -> StepTables:
    return StepTables(context_lens=plan.context_lens, num_new=plan.num_new, block_tables=plan.block_tables)
