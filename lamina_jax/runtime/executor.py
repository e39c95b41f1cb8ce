"""How the forward pass of a step is run, and the way that needs no workers: the whole model as one program."""

import abc
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lamina_jax import partition
from lamina_jax.attention.cache import PagedCache, StepTables, append
from lamina_jax.attention.kernels import get_kernel
from lamina_jax.attention.merge import merge
from lamina_jax.attention.params import AttendParams, LayerParams
from lamina_jax.attention.quantization import AUTO
from lamina_jax.runtime.gpu_options import compiler_options, exact_products
from lamina_jax.runtime.messages import Bucket
from lamina_jax.runtime.model import Model, input_shapes
from lamina_jax.runtime.plan import StepPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The KV cache that the attention side keeps."""

    page_size: int
    """Tokens in a page."""
    num_pages: int
    """Pages of a pool; every worker has a pool of so many for its heads."""
    kernel: str
    """Name in `lamina_jax.attention.kernels.KERNELS`."""
    dtype: str = AUTO
    """How it holds keys and values: a name in `lamina_jax.attention.quantization.STORED`."""


class Executor(abc.ABC):
    """Runs forward passes, one after another, on a device."""

    @abc.abstractmethod
    def prepare(self, bucket: Bucket, num_batches: int) -> None:
        """Compiles all that steps of `num_batches` batches of this bucket need, here and in the workers; quick if
        done before.

        Raises WorkerError if a worker fails."""

    @abc.abstractmethod
    def forward(
        self, plans: Sequence[StepPlan], tokens: Sequence[jax.Array | np.ndarray]
    ) -> Iterator[tuple[int, Float[Array, "batch vocab"]]]:
        """Dispatches the forward pass of one step of several batches; does not wait for it.

        Args:
            plans: one per batch, all of one prepared bucket.
            tokens: [batch, tokens] of each.

        Yields:
            The index of a plan and its logits, as soon as its last slice is dispatched. What the caller dispatches
            before it asks for the next comes between the slices.
        """

    @abc.abstractmethod
    def check(self) -> None:
        """Raises WorkerError if a worker or a channel is known to have failed.

        To be asked when a step's tokens are there and before they are used: kernels of a GPU cannot raise, so that a
        step whose messages failed ends like any other, with results that mean nothing."""

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
        self._kernel = get_kernel(config.kernel, model.device)
        self._cache = PagedCache.zeros(
            num_layers=len(model.sites),
            num_pages=config.num_pages,
            num_kv_heads=site.kv.shape[2],
            page_size=config.page_size,
            head_dim=site.kv.shape[3],
            dtype=site.kv.dtype,
            kv_cache_dtype=config.dtype,
            device=model.device,
        )
        self._compiled: dict[Bucket, jax.stages.Compiled] = {}

    def prepare(self, bucket: Bucket, num_batches: int) -> None:
        del num_batches
        if bucket in self._compiled:
            return
        traced = self._model.traced(bucket.batch, bucket.tokens)
        inputs = input_shapes(bucket.batch, bucket.tokens)
        weights = self._model.weights(traced)
        step = jax.jit(functools.partial(self._step, traced), donate_argnums=0)
        platform = self._model.device.platform
        with exact_products(platform, self._cache.k.dtype):
            lowered = step.lower(self._cache, weights, inputs, StepTables.shapes(bucket.batch, bucket.max_pages))
        self._compiled[bucket] = lowered.compile(compiler_options=compiler_options(platform))

    def forward(self, plans, tokens):
        for i, (plan, new) in enumerate(zip(plans, tokens, strict=True)):
            inputs = (new, plan.positions, plan.logit_index)
            weights = self._model.weights(self._model.traced(plan.bucket.batch, plan.bucket.tokens))
            self._cache, logits = self._compiled[plan.bucket](self._cache, weights, inputs, _tables(plan))
            yield i, logits

    def check(self) -> None:
        pass

    def explain(self, error: Exception) -> Exception:
        return error

    def close(self) -> None:
        pass

    def _step(self, traced: partition.Traced, cache: PagedCache, weights, inputs, tables: StepTables):
        def attend(layer: int, q, k, v, **params):
            nonlocal cache
            index, layer_params = jnp.int32(layer), LayerParams.of(AttendParams(**params))
            cached = self._kernel.attend_cached(q, cache, index, tables, layer_params)
            new = self._kernel.attend_new(q, k, v, layer_params)
            # Reads before writes, or XLA copies the cache.
            cached, k, v = jax.lax.optimization_barrier((cached, k, v))
            cache = append(cache, index, k, v, tables)
            return merge(cached, new).output(q.dtype)

        (logits,) = partition.unsplit(traced, weights, inputs, attend)
        return cache, logits


def _tables(plan: StepPlan) -> StepTables:
    return StepTables(context_lens=plan.context_lens, num_new=plan.num_new, block_tables=plan.block_tables)
