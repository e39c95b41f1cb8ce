"""The model modules by themselves; their numbers are checked in test_goldens.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from lamina_jax.models.llama import Llama, rope_angles, rotate
from lamina_jax.models.registry import model_class
from lamina_jax.testing import TINY_CONFIGS

ONE_OF_EACH = ["bias", "mistral", "qwen2", "qwen3", "gemma2"]
"""Of every architecture the config with the most kinds of parameters."""


@pytest.fixture(scope="module")
def model():
    return Llama(TINY_CONFIGS["gqa"], dtype=jnp.float32, rngs=nnx.Rngs(0))


def _make(name, dtype="float32"):
    config = TINY_CONFIGS[name]
    return model_class(config.architecture)(config, dtype=dtype, rngs=nnx.Rngs(0))


@nnx.jit
def _hidden_states(model, tokens, positions):
    return model.hidden_states(tokens, positions)


def _tokens(*, batch, tokens):
    return jax.random.randint(jax.random.key(0), (batch, tokens), 0, 256)


def _eqn_names(jaxpr):
    """Primitives in order of execution, those inside of calls included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from _eqn_names(inner)


@pytest.mark.parametrize(
    ("name", "scale", "windows", "soft_cap"),
    [
        ("gqa", 8**-0.5, [None, None], None),
        ("mistral", 8**-0.5, [24, 24], None),
        ("qwen2", 8**-0.5, [None, 24], None),
        ("qwen3", 12**-0.5, [None, None], None),
        ("gemma2", 64**-0.5, [24, None, 24, None], 4.0),
    ],
)
def test_attend_is_called_once_per_layer_with_its_parameters(name, scale, windows, soft_cap):
    model, tokens = _make(name), _tokens(batch=2, tokens=4)
    jaxpr = jax.make_jaxpr(lambda t: model.hidden_states(t, t))(tokens)
    attends = [eqn for eqn in _eqn_names(jaxpr.jaxpr) if eqn.primitive.name == "attend"]
    assert [eqn.params for eqn in attends] == [{"scale": scale, "window": w, "soft_cap": soft_cap} for w in windows]


def test_a_token_does_not_see_those_after_it(model):
    tokens = _tokens(batch=2, tokens=8)
    positions = jnp.broadcast_to(jnp.arange(8), (2, 8))
    changed = tokens.at[:, 5:].set(0)
    ours, theirs = (_hidden_states(model, t, positions) for t in (tokens, changed))
    np.testing.assert_array_equal(ours[:, :5], theirs[:, :5])
    assert not np.allclose(ours[:, 5:], theirs[:, 5:])


def test_only_differences_of_positions_matter(model):
    tokens = _tokens(batch=1, tokens=8)
    near, far = (_hidden_states(model, tokens, jnp.arange(8)[None] + start) for start in (0, 100))
    np.testing.assert_allclose(near, far, atol=1e-4)


def test_rotate_turns_pairs_of_channels_half_a_head_apart():
    config = TINY_CONFIGS["gqa"]
    cos, sin = rope_angles(jnp.array([[3]]), config)
    # The first pair turns by one radian per position.
    x = jnp.zeros((1, 1, 1, config.head_dim)).at[..., 0].set(1.0)
    expected = np.zeros(config.head_dim)
    expected[[0, config.head_dim // 2]] = np.cos(3), np.sin(3)
    np.testing.assert_allclose(rotate(x, cos, sin)[0, 0, 0], expected, atol=1e-6)


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_activations_have_the_models_dtype_and_logits_are_float32(name, dtype):
    model = _make(name, dtype)
    config = model.config
    tokens = _tokens(batch=2, tokens=3)
    hidden = jax.eval_shape(model.hidden_states, tokens, tokens)
    assert (hidden.shape, hidden.dtype) == ((2, 3, config.hidden_size), jnp.dtype(dtype))
    logits = jax.eval_shape(model, tokens, tokens, tokens[:, 0])
    assert (logits.shape, logits.dtype) == ((2, config.vocab_size), jnp.float32)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_loss_can_be_differentiated_with_respect_to_every_parameter(name):
    model, tokens = _make(name), _tokens(batch=2, tokens=4)

    def loss(model):
        return jnp.square(model.logits(model.hidden_states(tokens, jnp.broadcast_to(jnp.arange(4), (2, 4))))).mean()

    grads = nnx.to_flat_state(nnx.jit(nnx.grad(loss))(model))
    assert len(grads) == len(nnx.to_flat_state(nnx.state(model)))
    assert all(float(jnp.abs(g[...]).max()) > 0 for _, g in grads)
