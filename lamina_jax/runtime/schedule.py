"""When each slice of each batch runs, and where: rotational staggered pipelining.

Chen et al., arXiv 2405.01814v2, section 4.3: n batches are in flight on n - 1 replicas of the model and one pool of
attention workers. A slice takes the model t_m, its attention takes the pool t_a = t_m / (n - 1). Batches start t_a
apart, and slice k of batch j runs on replica (j + k) mod (n - 1), counted here from 0; every batch then moves on to
the next replica with every slice. Replicas and pool are busy all the time and never wanted by two batches at once.
With n = 2 there is one replica and nothing moves; with n = 1 model and pool take turns.
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, order=True)
class Turn:
    """One slice of one batch. Ordered by start, which is the order of dispatch."""

    start: int
    """In units of t_a."""
    batch: int
    slice: int
    replica: int


def num_replicas(num_batches: int) -> int:
    """Replicas of the model that keep `num_batches` batches in flight."""
    return max(1, num_batches - 1)


def turns(batches: Sequence[int], num_slices: int, *, num_batches: int, first_slice: int = 0) -> list[Turn]:
    """The turns of one step of each of some batches, in order of start.

    Args:
        batches: which of the batches in flight take part, in increasing order.
        num_slices: slices of a step, one more than the model has attends.
        num_batches: batches in flight, n.
        first_slice: slices of all steps before, counted as if every batch had taken part: the rotation goes on there.
    """
    n, replicas = num_batches, num_replicas(num_batches)
    return sorted(
        Turn(start=j + n * k, batch=j, slice=k, replica=(j + first_slice + k) % replicas)
        for k in range(num_slices)
        for j in batches
    )
