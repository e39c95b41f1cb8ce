"""Choosing the next token of every row of a batch, on the device.

The filters apply in this order, each to what the one before it left:

1. temperature: logits are divided by it;
2. top-k: the k most probable tokens;
3. top-p: of the rest, renormalised, the most probable tokens until their sum reaches top_p;
4. min-p: tokens at least min_p times as probable as the most probable one.

Tokens as probable as the last one that top-k or top-p keeps are kept too, so that the outcome does not hang on
the order of the vocabulary. Temperature 0 takes the most probable token, the one of lowest id among equals.

A row's random numbers come from its seed, its index within the request and its position alone: what it gets
depends neither on its neighbours nor on how far the batch is padded.
"""

import dataclasses
import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, Int32, UInt32

# Width of the groups that a token is drawn in. Near the square root of common vocabularies, and divides many.
_GROUP = 256


class SamplingMode(enum.StrEnum):
    """How much of the sampler a batch needs. Each mode also does what those before it do."""

    GREEDY = "greedy"
    """Every row takes its most probable token: one pass over the logits."""
    UNFILTERED = "unfiltered"
    """Temperature and min-p: a few passes, and random numbers for about 2 sqrt(vocab) candidates a row."""
    FILTERED = "filtered"
    """Top-k and top-p as well: 64 passes more, far less than a sort (14 ms, not 180, on two cores at 16 x 128k)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingTensors:
    """Sampling parameters of a batch, one entry per row: arrays of shape (batch,), NumPy's until they are moved.

    Attributes:
        temperature: float32; 0 takes the most probable token.
        top_k: int32; 0 keeps all tokens.
        top_p: float32 in (0, 1]; 1 keeps all tokens.
        min_p: float32 in [0, 1]; 0 drops no token.
        seed: uint32, of the request.
        index: uint32, which of the request's n completions the row is.
    """

    # JAX builds this class with leaves that are no arrays too: shapes, shardings, placeholders.
    __no_type_check__ = True

    temperature: Float32[Array, " batch"]
    top_k: Int32[Array, " batch"]
    top_p: Float32[Array, " batch"]
    min_p: Float32[Array, " batch"]
    seed: UInt32[Array, " batch"]
    index: UInt32[Array, " batch"]


def sample(
    logits: Float32[Array, "batch vocab"],
    params: SamplingTensors,
    positions: Int[Array, " batch"],
    *,
    mode: SamplingMode = SamplingMode.FILTERED,
) -> Int32[Array, " batch"]:
    """The next token of every row. Pure; to be jitted with `mode` static.

    Args:
        logits: may hold -inf (never drawn) if not in a whole row; no NaN.
        params: of the rows, as `lamina_jax.engine.sampling_tensors` makes them.
        positions: where in its sequence each row's new token will stand; not negative.
        mode: at least what the rows need, see `required_mode` in lamina_jax.engine.sampling_tensors. One that does
            more gives the same tokens.
    """
    greedy = _argmax(logits)
    if mode == SamplingMode.GREEDY:
        return greedy
    is_greedy = params.temperature == 0
    temperature = jnp.where(is_greedy, 1, params.temperature)
    # Less their maximum first: a small temperature then cannot overflow.
    shifted = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature[:, None]
    if mode == SamplingMode.FILTERED:
        shifted = _top_p(_top_k(shifted, params.top_k), params.top_p)
    shifted = jnp.where(shifted >= jnp.log(params.min_p)[:, None], shifted, -jnp.inf)
    keys = jax.vmap(_row_key)(params.seed, params.index, positions)
    return jnp.where(is_greedy, greedy, _draw(keys, shifted))


def _row_key(seed: UInt32[Array, ""], index: UInt32[Array, ""], position: Int[Array, ""]):
    # Names its generator: what a seed gives must not depend on JAX's settings.
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, index), position)


def _argmax(logits: Float32[Array, "batch vocab"]) -> Int32[Array, " batch"]:
    # Two plain reductions: XLA's own argmax carries pairs, which the CPU does not vectorise (5 times slower).
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    best = logits == jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(best, ids, logits.shape[1] - 1), axis=-1)


def _top_k(logits: Float32[Array, "batch vocab"], k: Int32[Array, " batch"]) -> Float32[Array, "batch vocab"]:
    order = _order(logits)
    last = _last_kept(order, jnp.ones_like(logits, jnp.int32), k)
    return jnp.where((order >= last[:, None]) | (k <= 0)[:, None], logits, -jnp.inf)


def _top_p(logits: Float32[Array, "batch vocab"], p: Float32[Array, " batch"]) -> Float32[Array, "batch vocab"]:
    order, weights = _order(logits), jnp.exp(logits)
    last = _last_kept(order, weights, p * jnp.sum(weights, axis=-1))
    return jnp.where((order >= last[:, None]) | (p >= 1)[:, None], logits, -jnp.inf)


def _order(x: Float32[Array, "batch vocab"]) -> UInt32[Array, "batch vocab"]:
    """Unsigned integers in the same order as the floats, so that thresholds can be found bit by bit."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # -0 and 0 are equal
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _last_kept(
    order: UInt32[Array, "batch vocab"],
    weights: Int32[Array, "batch vocab"] | Float32[Array, "batch vocab"],
    target: Int32[Array, " batch"] | Float32[Array, " batch"],
) -> UInt32[Array, " batch"]:
    """Per row the greatest threshold such that the weights at or above it sum to the target; 0 if all together don't.

    One bit per pass, highest first. A float sum only falls as terms become 0, so the search is sound for it too.
    """

    def set_bit(i, threshold):
        candidate = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        total = jnp.sum(jnp.where(order >= candidate[:, None], weights, 0), axis=-1)
        return jnp.where(total >= target, candidate, threshold)

    return jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(order.shape[0], jnp.uint32))


def _draw(keys: Array, logits: Float32[Array, "batch vocab"]) -> Int32[Array, " batch"]:
    """Draws from softmax(logits), whose maximum is 0: first a group of neighbouring tokens, then one of its tokens.

    One draw over the whole vocabulary would make a random number for each token, which on a CPU costs more than
    all the rest.
    """
    batch, vocab = logits.shape
    width = min(_GROUP, vocab)
    padded = jnp.pad(logits, ((0, 0), (0, -vocab % width)), constant_values=-jnp.inf)
    groups = padded.reshape(batch, -1, width)
    group_keys, token_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    draw = jax.vmap(jax.random.categorical)
    group = draw(group_keys, jnp.log(jnp.sum(jnp.exp(groups), axis=-1)))
    token = draw(token_keys, jnp.take_along_axis(groups, group[:, None, None], axis=1)[:, 0])
    return (group * width + token).astype(jnp.int32)
