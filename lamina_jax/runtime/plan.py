"""One step as the engine plans it: host arrays, padded to a bucket."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int

from lamina_jax.runtime.messages import Bucket
from lamina_jax.runtime.sampler import SamplingMode, SamplingTensors


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
