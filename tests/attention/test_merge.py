"""Merging partial attentions, against one-shot attention in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_jax.attention.merge import Partial, merge


def attention_float64(scores, v):
    """scores [h, s], v [s, h, d]; zero where there is nothing to attend to."""
    if scores.shape[1] == 0:
        return np.zeros((scores.shape[0], v.shape[2]))
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.einsum("hs,shd->hd", weights / weights.sum(axis=1, keepdims=True), v)


def partial_of(scores, v) -> Partial:
    return Partial.of_scores(
        jnp.asarray(scores, jnp.float32)[None, :, None, None, :], jnp.asarray(v, jnp.float32)[None]
    )


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    spread=st.sampled_from([1.0, 30.0, 300.0]),
    seed=st.integers(0, 2**32 - 1),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_merge_of_any_split_equals_one_shot(sizes, spread, seed, order):
    rng = np.random.default_rng(seed)
    scores, v = spread * rng.standard_normal((2, sum(sizes))), rng.standard_normal((sum(sizes), 2, 4))
    bounds = np.cumsum([0, *sizes])
    # An empty set is one whose scores are all masked; of_scores needs at least one column.
    parts = [
        partial_of(np.append(scores[:, a:b], np.full((2, 1), -np.inf), 1), np.append(v[a:b], np.zeros((1, 2, 4)), 0))
        for a, b in itertools.pairwise(bounds)
    ]
    order.shuffle(parts)
    merged = functools.reduce(merge, parts).output(jnp.float32)
    np.testing.assert_allclose(merged[0, 0], attention_float64(scores, v), atol=2e-5)


def test_empty_sets_merge_to_zero_without_nan():
    empty = partial_of(np.full((2, 3), -np.inf), np.ones((3, 2, 4)))
    merged = merge(empty, empty)
    assert not np.any(merged.output(jnp.float32))
    assert np.all(np.isneginf(merged.maximum))


def test_huge_scores_do_not_overflow():
    low, high = (partial_of(np.full((1, 1), s), np.full((1, 1, 2), v)) for s, v in ((-3e38, 5.0), (3e38, 7.0)))
    np.testing.assert_array_equal(merge(low, high).output(jnp.float32), 7.0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_output_dtype(dtype):
    assert partial_of(np.zeros((2, 3)), np.ones((3, 2, 4))).output(dtype).dtype == dtype


def test_partial_is_a_pytree():
    part = partial_of(np.zeros((2, 3)), np.ones((3, 2, 4)))
    assert len(jax.tree.leaves(part)) == 3
