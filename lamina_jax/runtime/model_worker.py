"""The model worker: everything of a step but its attention, and the sampling, on one device.

Each slot remembers its last sampled token on the device, and the next step of the slot starts from there. The host
reads tokens only to find out what was said; it may be late.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lamina_jax.runtime.executor import Executor
from lamina_jax.runtime.messages import Bucket
from lamina_jax.runtime.plan import StepPlan
from lamina_jax.runtime.sampler import SamplingMode, SamplingTensors, sample


class ModelWorker:
    """Runs planned steps through an executor and keeps each slot's last token."""

    def __init__(self, executor: Executor, num_slots: int) -> None:
        self.executor = executor
        self._last_tokens: jax.Array = jnp.zeros((num_slots,), jnp.int32)

    def prepare(self, bucket: Bucket) -> None:
        """Compiles what steps of a bucket need. Raises WorkerError if a worker fails."""
        self.executor.prepare(bucket)

    def run(self, plan: StepPlan) -> Int[Array, " batch"]:
        """Dispatches a step and returns its sampled tokens, which are not there yet."""
        return self.run_with_logits(plan)[0]

    def run_with_logits(self, plan: StepPlan) -> tuple[Int[Array, " batch"], Float[Array, "batch vocab"]]:
        """As `run`, with the logits that were sampled from."""
        tokens = _tokens_of(self._last_tokens, plan.slots) if plan.tokens is None else plan.tokens
        logits = self.executor.forward(plan, tokens)
        ends = plan.context_lens + plan.num_new
        slots = np.where(plan.emits, plan.slots, len(self._last_tokens))
        self._last_tokens, sampled = _sample_into(
            self._last_tokens, logits, plan.sampling, ends, slots, mode=plan.sampling_mode
        )
        return sampled, logits


def model_function(model: nnx.Module):
    """A model as a pure function and its weights: ``f(params, *inputs) -> (logits,)`` and ``params``."""
    graph, state = nnx.split(model)

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
