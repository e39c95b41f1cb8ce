"""The attend primitive as it stands: causal self-attention that can be jitted and differentiated."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lamina_jax.attention.attend import attend


def inputs(num_heads=4, num_kv_heads=2, tokens=5, head_dim=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    return [jax.random.normal(k, (2, tokens, h, head_dim), dtype) for k, h in zip(keys, heads, strict=True)]


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_equals_jax_nn(num_heads, num_kv_heads):
    q, k, v = inputs(num_heads, num_kv_heads)
    expected = jax.nn.dot_product_attention(q, k, v, scale=0.3, is_causal=True)
    np.testing.assert_allclose(attend(q, k, v, scale=0.3), expected, atol=2e-6)
    np.testing.assert_allclose(jax.jit(lambda *x: attend(*x, scale=0.3))(q, k, v), expected, atol=2e-6)


@pytest.mark.parametrize("window", [1, 3, 5, 9])
def test_window_equals_jax_nn(window):
    q, k, v = inputs()
    # There, a window does not count the token itself.
    expected = jax.nn.dot_product_attention(q, k, v, scale=0.3, local_window_size=(window - 1, 0))
    np.testing.assert_allclose(attend(q, k, v, scale=0.3, window=window), expected, atol=2e-6)


def test_soft_cap_bounds_the_scores():
    q, k, v = inputs(num_heads=2)
    capped = attend(1e6 * jnp.abs(q), -jnp.abs(k), v, scale=1.0, soft_cap=2.0)
    # All scores are -2, so the output is the mean of what a token sees.
    mean = jnp.cumsum(v, axis=1) / jnp.arange(1.0, 6.0)[None, :, None, None]
    np.testing.assert_allclose(capped, mean, atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"soft_cap": 0.7}])
def test_can_be_differentiated(options):
    f = lambda *qkv: attend(*map(jnp.asarray, qkv), scale=0.5, **options)  # noqa: E731
    check_grads(f, inputs(tokens=3), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q, k[..., :4], v[..., :4]), r"attend expects q .* got q \(2, 5, 4, 8\), k \(2, 5, 2, 4\)"),
        (lambda q, k, v: (q, k, v[:1]), "attend expects q"),
        (lambda q, k, v: (q[:, :, :3], k, v), "num_heads must be a multiple of num_kv_heads; got 3 and 2"),
        (lambda q, k, v: (q, k.astype(jnp.bfloat16), v), "one dtype; got float32, bfloat16, float32"),
    ],
)
def test_bad_shapes_are_refused(change, message):
    # Not decorated by the type checker of the tests: its message is not what a user sees.
    raw_attend = inspect.unwrap(attend)
    with pytest.raises(ValueError, match=message):
        jax.make_jaxpr(lambda *x: raw_attend(*x, scale=1.0))(*change(*inputs()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1, the token itself; got 0"),
        ({"soft_cap": 0.0}, r"soft_cap must be positive and finite; got 0\.0"),
        ({"soft_cap": float("inf")}, "soft_cap must be positive and finite; got inf"),
    ],
)
def test_bad_parameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        attend(*inputs(), scale=1.0, **options)
