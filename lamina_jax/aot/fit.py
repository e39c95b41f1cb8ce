"""Whether what a worker holds fits the memory of its device."""

import dataclasses
from collections.abc import Sequence

from lamina_jax.aot.compiler import Memory

RESERVE_BYTES = 2 << 30
"""What this check cannot see, by estimate: the CUDA context and loaded kernels (half a GiB), the buffers of NCCL, the
memory of CUDA graphs, and what the allocator loses to fragments."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """A worker's device memory, in bytes.

    Attributes:
        worker: as tables call it.
        held: what stays there from step to step: weights, or the KV cache.
        working: the most that one program takes besides, its inputs, results and temporaries.
        in_flight: values that batches in flight keep between programs.
        capacity: memory of the device.
        reserve: kept free for what cannot be seen ahead of time.
    """

    worker: str
    held: int
    working: int
    in_flight: int
    capacity: int
    reserve: int = RESERVE_BYTES

    @property
    def needed(self) -> int:
        """All of it, with the reserve."""
        return self.held + self.working + self.in_flight + self.reserve

    @property
    def free(self) -> int:
        """What is left; negative if it does not fit."""
        return self.capacity - self.needed

    @property
    def fits(self) -> bool:
        """Whether it fits."""
        return self.free >= 0


def working_bytes(memory: Memory, held: int) -> int:
    """What a program takes besides the `held` bytes of its arguments that are there anyway."""
    return memory.arguments - held + memory.outputs - memory.aliased + memory.temporaries


def fit_model_worker(*, weights: int, programs: Sequence[tuple[Memory, int]], in_flight: int, capacity: int) -> Fit:
    """A model device: all weights, and whichever slice takes the most.

    Args:
        weights: bytes of all weights on the device.
        programs: each slice's memory, and the bytes of weights among its arguments.
        in_flight: bytes that the batches keep between slices.
        capacity: memory of the device.
    """
    working = max(working_bytes(memory, held) for memory, held in programs)
    return Fit(worker="model worker", held=weights, working=working, in_flight=in_flight, capacity=capacity)


def fit_attention_worker(*, cache: int, memory: Memory, capacity: int) -> Fit:
    """An attention device: its KV cache, in place, and the step.

    A step that copies the cache shows here: its results are not in the memory of its arguments, or its temporaries
    are as large."""
    working = working_bytes(memory, cache)
    return Fit(worker="attention worker", held=cache, working=working, in_flight=0, capacity=capacity)
