"""The model worker: everything of a step but its attention, and the sampling, on one device.

Each slot remembers its last sampled token on the device, and the next step of the slot starts from there. The host
reads tokens only to find out what was said; it may be late.
"""

import abc
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lamina_jax.runtime.executor import Executor
from lamina_jax.runtime.messages import Bucket
from lamina_jax.runtime.plan import StepPlan
from lamina_jax.runtime.sampler import SamplingMode, SamplingTensors, sample


class StepRunner(abc.ABC):
    """Runs planned steps: a model worker, in this process or elsewhere."""

    @abc.abstractmethod
    def prepare(self, bucket: Bucket, num_batches: int) -> None:
        """Compiles what steps of so many batches of a bucket need. Raises WorkerError if a worker fails."""

    @abc.abstractmethod
    def run(self, plans: Sequence[StepPlan]) -> Sequence[Any]:
        """Dispatches a step of several batches, all of one prepared bucket.

        Returns:
            The sampled tokens of each, int32 [batch], which are not there yet: `np.asarray` waits for them, and raises
            the error of a step that failed.
        """

    @abc.abstractmethod
    def check(self) -> None:
        """As `Executor.check`."""

    @abc.abstractmethod
    def explain(self, error: Exception) -> Exception:
        """The exception to show the user for one that came out of a dispatched step."""

    @abc.abstractmethod
    def close(self) -> None:
        """Ends workers and frees channels; what is still running fails. May be called twice."""


class ModelWorker(StepRunner):
    """Runs planned steps through an executor and keeps each slot's last token."""

    def __init__(self, executor: Executor, *, num_slots: int, num_batches: int) -> None:
        self.executor = executor
        self._num_slots = num_slots
        # Of each batch, wherever its last slice ran.
        self._last_tokens: list[jax.Array] = [jnp.zeros((num_slots,), jnp.int32) for _ in range(num_batches)]

    def prepare(self, bucket: Bucket, num_batches: int) -> None:
        self.executor.prepare(bucket, num_batches)

    def run(self, plans: Sequence[StepPlan]) -> list[Int[Array, " batch"]]:
        return [sampled for sampled, _ in self.run_with_logits(plans)]

    def run_with_logits(
        self, plans: Sequence[StepPlan]
    ) -> list[tuple[Int[Array, " batch"], Float[Array, "batch vocab"]]]:
        """As `run`, with the logits that were sampled from."""
        tokens = [_tokens_of(self._last_tokens[p.batch], p.slots) if p.tokens is None else p.tokens for p in plans]
        results: dict[int, tuple[jax.Array, jax.Array]] = {}
        for i, logits in self.executor.forward(plans, tokens):
            results[i] = self._sample(plans[i], logits), logits
        return [results[i] for i in range(len(plans))]

    def check(self) -> None:
        self.executor.check()

    def explain(self, error: Exception) -> Exception:
        return self.executor.explain(error)

    def close(self) -> None:
        self.executor.close()

    def _sample(self, plan: StepPlan, logits: jax.Array) -> jax.Array:
        ends = plan.context_lens + plan.num_new
        slots = np.where(plan.emits, plan.slots, self._num_slots)
        last_tokens = jax.device_put(self._last_tokens[plan.batch], logits.sharding)
        self._last_tokens[plan.batch], sampled = _sample_into(
            last_tokens, logits, plan.sampling, ends, slots, mode=plan.sampling_mode
        )
        return sampled


def model_function(module: nnx.Module):
    """A model as a pure function and its weights: ``f(params, *inputs) -> (logits,)`` and ``params``."""
    graph, state = nnx.split(module)

    def apply(params, tokens, positions, logit_index):
        return (nnx.merge(graph, params)(tokens, positions, logit_index),)

    return apply, state


@jax.jit
def _tokens_of(last_tokens: Int[Array, " slots"], slots: Int[Array, " batch"]) -> Int[Array, "batch 1"]:
    return last_tokens.at[slots].get(mode="fill", fill_value=0)[:, None]


@functools.partial(jax.jit, static_argnames="mode")
def _sample_into(
    last_tokens: Int[Array, " slots"],
    logits: Float[Array, "batch vocab"],
    sampling: SamplingTensors,
    positions: Int[Array, " batch"],
    slots: Int[Array, " batch"],
    *,
    mode: SamplingMode,
) -> tuple[Int[Array, " slots"], Int[Array, " batch"]]:
    sampled = sample(logits, sampling, positions, mode=mode)
    return last_tokens.at[slots].set(sampled, mode="drop"), sampled
