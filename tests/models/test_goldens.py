"""The models against transformers: `tests/goldens` holds what that computed, see make_goldens.py there."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lamina_jax.models import load_model
from lamina_jax.testing import TINY_CONFIGS, write_tiny_checkpoint

GOLDENS = Path(__file__).parents[1] / "goldens"
PROMPT_LENGTHS = (1, 2, 16, 17, 45, 129, 300)


@pytest.fixture(scope="module", params=TINY_CONFIGS)
def golden(request, tmp_path_factory):
    """(checkpoint directory, what transformers made of it)."""
    directory = tmp_path_factory.mktemp(request.param)
    write_tiny_checkpoint(directory, request.param, num_shards=2)
    with np.load(GOLDENS / f"{request.param}.npz") as arrays:
        return directory, dict(arrays)


def _teacher_forced(golden):
    """Tokens [prompts, 363]: each prompt and its golden continuation, and then padding, which is in the future."""
    sequences = [np.concatenate([golden[f"prompt_{n}"], golden[f"tokens_{n}"][:-1]]) for n in PROMPT_LENGTHS]
    longest = max(map(len, sequences))
    return jnp.array([np.pad(sequence, (0, longest - len(sequence))) for sequence in sequences])


def _positions(tokens):
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


@nnx.jit
def _all_logits(model, tokens):
    return model.logits(model.hidden_states(tokens, _positions(tokens)))


def test_float32_is_what_transformers_computes(golden):
    directory, expected = golden
    _, model = load_model(directory)
    logits = np.asarray(_all_logits(model, _teacher_forced(expected)))
    for row, n in zip(logits, PROMPT_LENGTHS, strict=True):
        generated = row[n - 1 : n + 63]
        np.testing.assert_array_equal(generated.argmax(-1), expected[f"tokens_{n}"])
        np.testing.assert_allclose(generated[0], expected[f"first_logits_{n}"], atol=1e-4, rtol=0)
        np.testing.assert_allclose(generated[-1], expected[f"last_logits_{n}"], atol=1e-4, rtol=0)


def test_call_gives_the_logits_at_logit_index(golden):
    directory, expected = golden
    _, model = load_model(directory)
    tokens = _teacher_forced(expected)
    last = jnp.array(PROMPT_LENGTHS) - 1
    logits = np.asarray(nnx.jit(type(model).__call__)(model, tokens, _positions(tokens), last))
    for row, n in zip(logits, PROMPT_LENGTHS, strict=True):
        np.testing.assert_allclose(row, expected[f"first_logits_{n}"], atol=1e-4, rtol=0)


def test_bfloat16_stays_near_float32(golden):
    directory, expected = golden
    tokens = _teacher_forced(expected)
    exact = np.asarray(_all_logits(load_model(directory)[1], tokens))
    rounded = np.asarray(_all_logits(load_model(directory, dtype="bfloat16")[1], tokens))
    # Measured 1.7 to 2.4 % of the logits' spread over all positions.
    error = np.sqrt(np.square(rounded - exact).mean())
    assert error < 0.04 * exact.std()
