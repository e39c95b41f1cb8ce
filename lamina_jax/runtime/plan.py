"""One step as the engine plans it: host arrays, padded to a bucket."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from lamina_jax.runtime.messages import Bucket, PlannedBatch
from lamina_jax.runtime.sampler import SamplingMode, SamplingTensors

_SAMPLING_DTYPES = {
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "seed": np.uint32,
    "index": np.uint32,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPlan:
    """A step of up to `bucket.batch` sequences. Rows past the last sequence have ``num_new == 0``.

    Arrays must not be written to afterwards: the device may read them in place.
    """

    bucket: Bucket
    batch: int
    """Which of the batches in flight this is a step of."""
    tokens: Int[np.ndarray, "batch tokens"] | None
    """The new tokens; None for the token that was sampled last for each row's slot, which the host need not know."""
    slots: Int[np.ndarray, " batch"]
    """Where each sequence keeps its last sampled token; `max_num_seqs` for padding."""
    context_lens: Int[np.ndarray, " batch"]
    """Tokens in the cache before the step."""
    num_new: Int[np.ndarray, " batch"]
    """Valid columns of `tokens`."""
    block_tables: Int[np.ndarray, "batch max_pages"]
    """Pages of each sequence."""
    emits: Bool[np.ndarray, " batch"]
    """Whether the row's sampled token counts; false for all but the last piece of a prompt, and for padding."""
    sampling: SamplingTensors
    """How to sample, per row."""
    sampling_mode: SamplingMode
    """How much of the sampler the rows need."""

    @property
    def positions(self) -> Int[np.ndarray, "batch tokens"]:
        """Position of every new token in its sequence."""
        return self.context_lens[:, None] + np.arange(self.bucket.tokens, dtype=np.int32)

    @property
    def logit_index(self) -> Int[np.ndarray, " batch"]:
        """Column whose logits are sampled: the last valid one."""
        return np.maximum(self.num_new - 1, 0)


def encode_plan(plan: StepPlan) -> PlannedBatch:
    """The plan as a message."""
    return PlannedBatch(
        bucket=plan.bucket,
        batch=plan.batch,
        tokens=None if plan.tokens is None else plan.tokens.tobytes(),
        slots=plan.slots.tobytes(),
        context_lens=plan.context_lens.tobytes(),
        num_new=plan.num_new.tobytes(),
        block_tables=plan.block_tables.tobytes(),
        emits=plan.emits.tobytes(),
        sampling={name: getattr(plan.sampling, name).tobytes() for name in _SAMPLING_DTYPES},
        sampling_mode=plan.sampling_mode.value,
    )


def decode_plan(message: PlannedBatch) -> StepPlan:
    """The plan that a message has. Raises ValueError if a part is missing, or not of the size that the bucket says."""
    bucket = message.bucket

    def array(data: bytes, *shape: int, dtype: type = np.int32) -> np.ndarray:
        return np.frombuffer(data, dtype).reshape(bucket.batch, *shape)

    if message.sampling.keys() != _SAMPLING_DTYPES.keys():
        raise ValueError(f"expected sampling to have {sorted(_SAMPLING_DTYPES)}, got {sorted(message.sampling)}")
    sampling: dict[str, Any] = {
        name: array(message.sampling[name], dtype=dtype) for name, dtype in _SAMPLING_DTYPES.items()
    }
    return StepPlan(
        bucket=bucket,
        batch=message.batch,
        tokens=None if message.tokens is None else array(message.tokens, bucket.tokens),
        slots=array(message.slots),
        context_lens=array(message.context_lens),
        num_new=array(message.num_new),
        block_tables=array(message.block_tables, bucket.max_pages),
        emits=array(message.emits, dtype=np.bool_),
        sampling=SamplingTensors(**sampling),
        sampling_mode=SamplingMode(message.sampling_mode),
    )
