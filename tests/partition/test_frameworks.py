"""The converter on models as people write them: Flax Linen, and plain JAX under the transformations of a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from slices import HIDDEN, check, layer, weights

from lamina_jax.attention.attend import attend

X = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, HIDDEN)), jnp.float32)
NUM_LAYERS = 4


class Attention(linen.Module):
    """Grouped heads with everything an attend can be told."""

    num_heads: int = 4
    num_kv_heads: int = 2
    window: int | None = None
    soft_cap: float | None = None

    @linen.compact
    def __call__(self, x):
        head_dim = x.shape[-1] // self.num_heads
        heads = lambda count, name: linen.DenseGeneral((count, head_dim), name=name)(x)  # noqa: E731
        q, k, v = heads(self.num_heads, "q"), heads(self.num_kv_heads, "k"), heads(self.num_kv_heads, "v")
        attended = attend(q, k, v, scale=head_dim**-0.5, window=self.window, soft_cap=self.soft_cap)
        return linen.DenseGeneral(x.shape[-1], axis=(-2, -1), name="o")(attended)


class Block(linen.Module):
    """Attention and a feed-forward network, with a result that a scan can stack."""

    window: int | None = None
    soft_cap: float | None = None

    @linen.compact
    def __call__(self, x, _=None):
        x = x + Attention(window=self.window, soft_cap=self.soft_cap)(linen.LayerNorm()(x))
        return x + linen.Dense(x.shape[-1])(linen.gelu(linen.Dense(2 * x.shape[-1])(linen.RMSNorm()(x)))), None


class Decoder(linen.Module):
    """Blocks in a row, every other one with a window and a cap."""

    block: type[linen.Module] = Block

    @linen.compact
    def __call__(self, x):
        for i in range(NUM_LAYERS):
            options = {"window": 2, "soft_cap": 3.0} if i % 2 else {}
            x, _ = self.block(**options)(x)
        return linen.Dense(5)(x)


class ScannedDecoder(linen.Module):
    """One block, scanned over its weights and rematerialized."""

    @linen.compact
    def __call__(self, x):
        scanned = linen.scan(
            linen.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=NUM_LAYERS
        )
        x, _ = scanned()(x, None)
        return linen.Dense(5)(x)


WINDOWED = [(None, None), (2, 3.0)] * 2


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (Decoder(), WINDOWED),
        (Decoder(block=linen.remat(Block)), WINDOWED),
        (ScannedDecoder(), [(None, None)] * NUM_LAYERS),
    ],
    ids=["blocks", "remat", "scan of remat"],
)
def test_a_linen_model_is_cut_like_any_other(module, options):
    variables = jax.jit(module.init)(jax.random.key(0), X)
    parts = check(jax.jit(lambda variables, x: (module.apply(variables, x),)), variables, X)
    assert [(s.params.window, s.params.soft_cap) for s in parts.sites] == options
    assert {(s.q.shape, s.kv.shape) for s in parts.sites} == {((2, 3, 4, 4), (2, 3, 2, 4))}
    # Windows and caps are the attend's and not the slices', so that all between the first and the last are equal.
    assert len(parts.programs) == 3
    assert [s.context_bytes for s in parts.slices] == [0, *[X.nbytes] * (NUM_LAYERS - 1), 0]


@jax.custom_jvp
def layer_with_a_jvp(w, x):
    return layer(w, x)


@layer_with_a_jvp.defjvp
def _layer_jvp(primals, tangents):
    return jax.jvp(layer, primals, tangents)


@jax.custom_vjp
def layer_with_a_vjp(w, x):
    return layer(w, x)


layer_with_a_vjp.defvjp(lambda w, x: (layer(w, x), (w, x)), lambda saved, g: jax.vjp(layer, *saved)[1](g))


def scanned(body):
    """A layer that is a scan over two copies of its weights."""

    def run(w, x):
        pair = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), w)
        return jax.lax.scan(lambda x, w: (body(w, x), None), x, pair)[0]

    return run


WRAPPERS = {
    "jit": jax.jit(layer),
    "jit of jit": jax.jit(lambda w, x: jax.jit(layer)(w, x)),
    "checkpoint": jax.checkpoint(layer),
    "checkpoint with a policy": jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_saveable),
    "custom_jvp": layer_with_a_jvp,
    "custom_vjp": layer_with_a_vjp,
    "scan": scanned(layer),
    "scan of jit of checkpoint": scanned(jax.jit(jax.checkpoint(layer))),
    "scan of scan": scanned(scanned(layer)),
    "jit of scan of custom_jvp": jax.jit(scanned(layer_with_a_jvp)),
    "checkpoint of scan of custom_vjp": jax.checkpoint(scanned(layer_with_a_vjp)),
    "fori_loop": lambda w, x: jax.lax.fori_loop(0, 2, lambda _, x: layer(w, x), x),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_attends_are_found_under_the_transformations_of_a_model(name):
    params = weights(2)

    def wrapped(params, x):
        return (functools.reduce(lambda x, w: WRAPPERS[name](w, x), params, x),)

    parts = check(wrapped, params, X)
    loops = name.count("scan") + name.count("fori_loop")
    assert len(parts.sites) == 2 * 2**loops
    assert [s.context_bytes for s in parts.slices[1:-1]] == [X.nbytes] * (len(parts.sites) - 1)
