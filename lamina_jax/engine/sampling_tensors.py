"""Sampling parameters of the sequences of a step, as the arrays that the device samples with."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lamina_jax.engine.sampling_params import SamplingParams
from lamina_jax.runtime.sampler import SamplingMode, SamplingTensors


def build_sampling_tensors(rows: Sequence[tuple[SamplingParams, int, int]], batch: int) -> SamplingTensors:
    """Host (NumPy) tensors of a batch, padded to its bucket with greedy rows.

    Args:
        rows: per row its parameters, the request's seed (a signed 64-bit integer; it stands in for
            `params.seed`, which may be None) and the completion's index within the request.
        batch: rows of the bucket.

    Raises:
        ValueError: there are more rows than the bucket holds.
    """
    if len(rows) > batch:
        raise ValueError(f"A bucket of {batch} rows cannot hold {len(rows)} sequences.")
    columns: dict[str, Any] = {
        "temperature": np.zeros(batch, np.float32),
        "top_k": np.zeros(batch, np.int32),
        "top_p": np.ones(batch, np.float32),
        "min_p": np.zeros(batch, np.float32),
        "seed": np.zeros(batch, np.uint32),
        "index": np.zeros(batch, np.uint32),
    }
    for row, (params, seed, index) in enumerate(rows):
        if _takes_maximum(params):
            continue
        columns["temperature"][row] = params.temperature
        columns["top_k"][row] = min(max(params.top_k, 0), np.iinfo(np.int32).max)
        columns["top_p"][row] = params.top_p
        columns["min_p"][row] = params.min_p
        columns["seed"][row] = _seed_word(seed)
        columns["index"][row] = index
    return SamplingTensors(**columns)


def required_mode(params: Sequence[SamplingParams]) -> SamplingMode:
    """The cheapest mode that is right for a batch of these parameters."""
    random = [p for p in params if not _takes_maximum(p)]
    if not random:
        return SamplingMode.GREEDY
    if any(p.top_k > 0 or p.top_p < 1.0 for p in random):
        return SamplingMode.FILTERED
    return SamplingMode.UNFILTERED


def _takes_maximum(params: SamplingParams) -> bool:
    # top_k = 1 keeps ties, between which greedy sampling chooses without chance; users expect the two to agree.
    return params.greedy or params.top_k == 1


def _seed_word(seed: int) -> int:
    """Folds 64 bits into 32, so that seeds of 32 bits stay distinct."""
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    return (low + 0x9E3779B9 * high) & 0xFFFFFFFF
