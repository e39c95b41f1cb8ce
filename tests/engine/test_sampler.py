import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_jax.engine.sampling_params import SamplingParams
from lamina_jax.engine.sampling_tensors import build_sampling_tensors, required_mode
from lamina_jax.runtime.sampler import SamplingMode, sample

DRAWS = 4096
GREEDY = SamplingParams(temperature=0)
ROWS = [
    SamplingParams(temperature=0.8, top_k=5, top_p=0.9),
    SamplingParams(temperature=1.5, min_p=0.1),
    GREEDY,
    SamplingParams(top_p=0.5),
]


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@functools.cache
def jitted(mode: SamplingMode):
    return jax.jit(functools.partial(sample, mode=mode))


def tokens_of(logits, rows, positions, *, mode=SamplingMode.FILTERED, batch=None) -> np.ndarray:
    """Tokens of rows of (params, seed, index), padded to `batch` rows."""
    batch = batch or len(rows)
    logits, positions = np.asarray(logits, np.float32), np.asarray(positions, np.int32)
    logits = np.pad(logits, ((0, batch - len(rows)), (0, 0)))
    positions = np.pad(positions, (0, batch - len(rows)))
    tokens = jitted(mode)(jnp.asarray(logits), build_sampling_tensors(rows, batch), jnp.asarray(positions))
    assert tokens.dtype == jnp.int32
    return np.asarray(tokens)[: len(rows)]


def draws(logits, params, *, seed=0, mode=SamplingMode.FILTERED) -> np.ndarray:
    """DRAWS tokens from the same logits, at positions 0, 1, ..."""
    logits = np.asarray(logits, np.float32)
    row = build_sampling_tensors([(params, seed, 0)], 1)
    tensors = jax.tree.map(lambda x: np.repeat(x, DRAWS), row)
    return np.asarray(jitted(mode)(jnp.asarray(np.tile(logits, (DRAWS, 1))), tensors, jnp.arange(DRAWS)))


def reference(logits, params, *, slack=0.0) -> np.ndarray:
    """Probabilities by sorting, in float64. `slack` widens the top-p and min-p sets by that much probability."""
    logits = np.asarray(np.asarray(logits, np.float32), np.float64)
    scaled = (logits - logits.max()) / params.temperature
    weights = np.exp(scaled)
    if params.top_k > 0:
        weights[logits < np.sort(logits)[::-1][: params.top_k].min()] = 0
    weights /= weights.sum()
    if params.top_p < 1:
        ranked = np.sort(weights)[::-1]
        reached = int(np.searchsorted(np.cumsum(ranked), params.top_p + slack))
        weights[weights < ranked[min(reached, len(ranked) - 1)]] = 0
    weights[weights < min(params.min_p * weights.max() - slack, weights.max())] = 0
    return weights / weights.sum()


def chi_square(tokens, probabilities) -> float:
    """Deviations above the mean of a chi-square test; tokens expected fewer than 5 times are pooled."""
    expected = probabilities * len(tokens)
    counts = np.bincount(tokens, minlength=len(expected)).astype(float)
    common = expected >= 5
    expected = np.append(expected[common], expected[~common].sum())
    counts = np.append(counts[common], counts[~common].sum())
    assert counts[expected == 0].sum() == 0
    expected, counts = expected[expected > 0], counts[expected > 0]
    freedom = max(len(expected) - 1, 1)
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.integers(-12, 12).map(lambda i: i / 4), min_size=10, max_size=10),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([-1, 0, 2, 3, 7, 10, 1000]),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_support_and_frequencies(logits, temperature, top_k, top_p, min_p, seed):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    seen = np.unique(draws(logits, params, seed=seed))
    allowed, surely = reference(logits, params, slack=1e-5), reference(logits, params, slack=-1e-5)
    assert np.all(allowed[seen] > 0)
    # The rarest of these goes unseen once in e^20 draws of 4096.
    assert set(np.flatnonzero(surely > 0.005)) <= set(seen)


@pytest.mark.parametrize("vocab", [1, 7, 256, 257, 1000])
@pytest.mark.parametrize("params", [SamplingParams(), *ROWS[:2], SamplingParams(top_k=300, top_p=0.95)])
def test_distribution(vocab, params):
    logits = np.random.default_rng(vocab).normal(size=vocab) * 2
    deviation = chi_square(draws(logits, params, seed=vocab), reference(logits, params))
    assert deviation < 5


def test_frequencies_over_seeds_and_indices():
    """Randomness comes from all three of seed, index and position."""
    logits, params = np.log([0.5, 0.3, 0.15, 0.05]), SamplingParams()
    for rows in ([(params, seed, 0) for seed in range(DRAWS)], [(params, 0, index) for index in range(DRAWS)]):
        tokens = tokens_of(np.tile(logits, (DRAWS, 1)), rows, np.zeros(DRAWS))
        assert chi_square(tokens, np.exp(logits)) < 5


def test_masked_tokens_are_never_drawn():
    logits = np.full(600, -np.inf)
    logits[[3, 299, 599]] = 0.0
    for params in (SamplingParams(temperature=2.0), SamplingParams(top_k=500, top_p=0.999)):
        assert set(draws(logits, params)) == {3, 299, 599}


def test_top_k_and_top_p_keep_ties():
    assert set(draws([1.0, 2.0, 1.0, 0.0], SamplingParams(top_k=2))) == {0, 1, 2}
    assert set(draws([0.0, 0.0, -0.0, -9.0], SamplingParams(top_p=0.4))) == {0, 1, 2}


def test_top_p_applies_to_what_top_k_left():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert set(draws(logits, SamplingParams(top_p=0.65))) == {0, 1}
    assert set(draws(logits, SamplingParams(top_k=2, top_p=0.55))) == {0}  # 0.4 / 0.7 is more than 0.55


@pytest.mark.parametrize("mode", list(SamplingMode))
def test_greedy_takes_the_lowest_of_equals(mode):
    logits = [[0, 5, 1, 5], [7, 7, 7, 7], [-np.inf, -np.inf, -3, -3], [1, 2, 3, 4]]
    rows = [(GREEDY, seed, 0) for seed in range(4)]
    assert tokens_of(logits, rows, range(4), mode=mode).tolist() == [1, 0, 2, 3]


def test_top_k_of_one_is_greedy():
    logits = np.random.default_rng(0).integers(0, 3, (64, 50))
    tokens = tokens_of(logits, [(SamplingParams(top_k=1, temperature=2.0), i, 0) for i in range(64)], range(64))
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))


def test_a_tiny_temperature_does_not_overflow():
    logits = np.random.default_rng(1).normal(size=(16, 300)) * 1e4
    tokens = tokens_of(logits, [(SamplingParams(temperature=1e-5), i, 0) for i in range(16)], range(16))
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))


@pytest.mark.parametrize("vocab", [40, 2000])
def test_a_row_depends_on_nothing_around_it(vocab):
    rng = np.random.default_rng(2)
    logits, positions = rng.normal(size=(12, vocab)), rng.integers(0, 1000, 12)
    rows = [(ROWS[i % 4], 1000 + i // 3, i % 3) for i in range(12)]
    together = tokens_of(logits, rows, positions)
    order = rng.permutation(12)
    shuffled = tokens_of(logits[order], [rows[i] for i in order], positions[order], batch=32)
    np.testing.assert_array_equal(shuffled, together[order])
    for i in range(12):
        assert tokens_of(logits[i : i + 1], [rows[i]], positions[i : i + 1]) == together[i]


def test_a_seed_gives_the_same_tokens_again_and_others_give_others():
    logits, params = np.zeros(1000), SamplingParams()
    first = draws(logits, params, seed=5)
    np.testing.assert_array_equal(first, draws(logits, params, seed=5))
    for other in (6, 5 + 2**32, -5):
        assert np.mean(first == draws(logits, params, seed=other)) < 0.02


def test_a_fuller_mode_gives_the_same_tokens():
    logits = np.random.default_rng(3).normal(size=500) * 2
    params = SamplingParams(temperature=0.9, min_p=0.02)
    np.testing.assert_array_equal(draws(logits, params), draws(logits, params, mode=SamplingMode.UNFILTERED))


def test_required_mode():
    hot = SamplingParams(min_p=0.1)
    assert required_mode([]) is SamplingMode.GREEDY
    assert required_mode([GREEDY, SamplingParams(temperature=0, top_p=0.5), SamplingParams(top_k=1)]) == "greedy"
    assert required_mode([GREEDY, hot, SamplingParams(top_k=-1)]) is SamplingMode.UNFILTERED
    assert required_mode([hot, SamplingParams(top_k=2)]) is SamplingMode.FILTERED
    assert required_mode([hot, SamplingParams(top_p=0.99)]) is SamplingMode.FILTERED


def test_build_pads_with_greedy_rows_and_refuses_too_many():
    tensors = build_sampling_tensors([(ROWS[0], -1, 3)], 2)
    assert tensors.temperature.tolist() == [np.float32(0.8), 0]
    assert (tensors.top_k.tolist(), tensors.index.tolist()) == ([5, 0], [3, 0])
    assert [x.dtype for x in jax.tree.leaves(tensors)] == ["float32", "int32", "float32", "float32", "uint32", "uint32"]
    with pytest.raises(ValueError, match="bucket of 1 rows cannot hold 2"):
        build_sampling_tensors([(GREEDY, 0, 0)] * 2, 1)


def test_can_be_lowered_from_shapes_alone():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), build_sampling_tensors([], 4))
    logits, positions = jax.ShapeDtypeStruct((4, 32), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32)
    lowered = jitted(SamplingMode.FILTERED).lower(logits, shapes, positions)
    assert "stablehlo.sort" not in lowered.as_text()
