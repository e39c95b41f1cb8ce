"""Merging partial attentions, against one-shot attention in float64."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_jax.attention.cache import PagedCache, StepTables
from lamina_jax.attention.kernels import get_kernel
from lamina_jax.attention.kernels.xla import _scores
from lamina_jax.attention.merge import Partial, merge
from lamina_jax.attention.params import AttendParams, LayerParams


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


# What follows splits the attention of a whole step: requests with contexts of their own, grouped heads, several new
# tokens each. Shapes stay the same, so that each dtype compiles once; what varies are lengths, masks and numbers.
REQUESTS, TOKENS, KEYS, HEADS, KV_HEADS, DIM = 3, 3, 24, 4, 2, 8
MAX_SETS = 8
PAGE = 4
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
"""Outputs are means of values within about 4 of zero. bf16 rounds them and the weights by up to 2 ** -9."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A step's queries, and all keys and values that they may see; the last TOKENS keys of a request are its new ones.

    q [REQUESTS, TOKENS, HEADS, DIM], k and v [REQUESTS, KEYS, KV_HEADS, DIM] in the dtype under test; lengths
    [REQUESTS] are the cached tokens. A request's keys are at its first ``lengths + TOKENS`` places, the rest is noise.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    lengths: np.ndarray
    params: AttendParams

    @classmethod
    def draw(cls, dtype: str, lengths, params: AttendParams, seed: int) -> "Step":
        rng = np.random.default_rng(seed)
        draw = lambda count, heads: jnp.asarray(rng.standard_normal((REQUESTS, count, heads, DIM)), dtype)  # noqa: E731
        return cls(draw(TOKENS, HEADS), draw(KEYS, KV_HEADS), draw(KEYS, KV_HEADS), np.array(lengths), params)

    def visible(self) -> np.ndarray:
        """Whether a new token sees a key, bool [REQUESTS, TOKENS, KEYS]: causal, and within the window."""
        query = self.lengths[:, None, None] + np.arange(TOKENS)[None, :, None]
        distance = query - np.arange(KEYS)[None, None, :]
        return (distance >= 0) & (distance < (self.params.window or KEYS + 1))

    def expected(self) -> np.ndarray:
        """One-shot attention in float64, query by query, over the keys that it sees and no others."""
        q, k, v = (np.asarray(x).astype(np.float64) for x in (self.q, self.k, self.v))
        out, visible = np.zeros(q.shape), self.visible()
        for b, t, h in np.ndindex(REQUESTS, TOKENS, HEADS):
            seen, kv_head = visible[b, t], h // (HEADS // KV_HEADS)
            scores = self.params.scale * k[b, seen, kv_head] @ q[b, t, h]
            if self.params.soft_cap is not None:
                scores = self.params.soft_cap * np.tanh(scores / self.params.soft_cap)
            out[b, t, h] = attention_float64(scores[None], v[b, seen, kv_head][:, None])[0]
        return out

    def check(self, output: jax.Array) -> None:
        assert output.dtype == self.q.dtype
        got, expected = np.asarray(output).astype(np.float64), self.expected()
        np.testing.assert_allclose(got, expected, atol=TOLERANCE[str(self.q.dtype)], rtol=0)


steps = st.builds(
    Step.draw,
    dtype=st.sampled_from(["float32", "bfloat16"]),
    lengths=st.tuples(*[st.integers(0, KEYS - TOKENS)] * REQUESTS),
    params=st.builds(
        AttendParams,
        scale=st.sampled_from([DIM**-0.5, 2.0]),
        window=st.none() | st.integers(1, KEYS),
        soft_cap=st.none() | st.floats(0.5, 50.0),
    ),
    seed=st.integers(0, 2**32 - 1),
)


@jax.jit
def partials(q, k, v, params, masks) -> list[Partial]:
    """The attention over each of MAX_SETS index sets; `masks` is bool [MAX_SETS, REQUESTS, TOKENS, KEYS]."""
    return [Partial.of_scores(_scores(q, k, params, mask), v) for mask in masks]


def merged_one_by_one(parts: list[Partial]) -> Partial:
    return functools.reduce(merge, parts)


def merged_in_pairs(parts: list[Partial]) -> Partial:
    while len(parts) > 1:
        parts = [functools.reduce(merge, parts[i : i + 2]) for i in range(0, len(parts), 2)]
    return parts[0]


def split(step: Step, owner: np.ndarray, num_sets: int) -> list[Partial]:
    """The attentions over the keys of each set; `owner` [REQUESTS, KEYS] is the set that a key is in."""
    masks = step.visible() & (owner[:, None] == np.arange(MAX_SETS)[:, None, None, None])
    return partials(step.q, step.k, step.v, LayerParams.of(step.params), jnp.asarray(masks))[:num_sets]


def owners(kind: str, num_sets: int, rng: np.random.Generator) -> np.ndarray:
    """Which set each key is in, [REQUESTS, KEYS]."""
    match kind:
        case "any":
            return rng.integers(0, num_sets, (REQUESTS, KEYS))
        case "prefixes":
            # Consecutive pieces, as of pages that several requests share, some of them empty.
            return np.sort(rng.integers(0, num_sets, (REQUESTS, KEYS)), axis=1)
        case _:
            return np.broadcast_to(rng.integers(0, num_sets, (REQUESTS, 1)), (REQUESTS, KEYS))


@pytest.mark.parametrize("merged", [merged_one_by_one, merged_in_pairs])
@pytest.mark.parametrize("kind", ["any", "prefixes", "requests"])
@given(step=steps, num_sets=st.integers(1, MAX_SETS), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_attention_over_index_sets_merges_to_one_shot(kind, merged, step, num_sets, seed):
    parts = split(step, owners(kind, num_sets, np.random.default_rng(seed)), num_sets)
    step.check(merged(parts).output(step.q.dtype))


@given(step=steps, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_a_request_that_one_set_holds_keeps_its_bits(step, seed):
    """Request-level splits: the other workers' parts are empty, and merging them changes nothing at all."""
    owner = owners("requests", MAX_SETS, np.random.default_rng(seed))
    parts = split(step, owner, MAX_SETS)
    output = merged_one_by_one(parts).output(step.q.dtype)
    for b in range(REQUESTS):
        np.testing.assert_array_equal(output[b], parts[owner[b, 0]].output(step.q.dtype)[b])


@functools.partial(jax.jit, static_argnames="tokens_first")
def _attend_in_three(q, k, v, cached_k, cached_v, prefix, lengths, params, tokens_first):
    """Attention over a cached prefix, the rest of the cache, and the new tokens, from the kernel that workers run.

    The cache of each part holds KEYS places per request, in pages of its own.
    """
    kernel = get_kernel("xla", jax.devices()[0])
    pages = KEYS // PAGE
    tables = jnp.arange(REQUESTS * pages, dtype=jnp.int32).reshape(REQUESTS, pages)
    paged = lambda x: jnp.moveaxis(x.reshape(-1, PAGE, KV_HEADS, DIM), 1, 2)[None]  # noqa: E731
    step = lambda n: StepTables(context_lens=n, num_new=jnp.full_like(n, TOKENS), block_tables=tables)  # noqa: E731
    # Seen from the prefix alone, the new tokens seem nearer than they are, by what is cached after it.
    rest = lengths - prefix
    nearer = dataclasses.replace(params, window=params.window - rest[0])
    tails = [jax.vmap(lambda x, n: jnp.roll(x, -n, axis=0))(x, prefix) for x in (cached_k, cached_v)]
    layer = jnp.int32(0)
    over_prefix = kernel.attend_cached(q, PagedCache(k=paged(cached_k), v=paged(cached_v)), layer, step(prefix), nearer)
    over_rest = kernel.attend_cached(q, PagedCache(k=paged(tails[0]), v=paged(tails[1])), layer, step(rest), params)
    new = kernel.attend_new(q, k, v, params)
    parts = [new, over_rest, over_prefix] if tokens_first else [over_prefix, over_rest, new]
    return merged_one_by_one(parts).output(q.dtype)


@given(step=steps, rest=st.integers(0, KEYS - TOKENS), tokens_first=st.booleans())
@settings(max_examples=60, deadline=None)
def test_prefix_rest_and_new_tokens_merge_to_one_shot(step, rest, tokens_first):
    """Prefix splits through the kernel: what is cached comes from two places, and k and v from a third."""
    # One window serves all requests, so that all have as much behind their prefixes; these may be empty.
    rest = min(rest, step.lengths.min())
    lengths = jnp.asarray(step.lengths, jnp.int32)
    k, v = (jnp.stack([x[b, n : n + TOKENS] for b, n in enumerate(step.lengths)]) for x in (step.k, step.v))
    params = LayerParams.of(step.params)
    step.check(_attend_in_three(step.q, k, v, step.k, step.v, lengths - rest, lengths, params, tokens_first))
