"""The converter on plain functions: what it cuts, what it shares, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamina_jax.attention.attend import attend, causal_attention
from lamina_jax.partition import cut, trace, unsplit

HIDDEN, HEADS, DIM = 16, 2, 8


def weights(num_layers, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) * 0.2, jnp.float32)  # noqa: E731
    return [{name: draw(HIDDEN, HIDDEN) for name in "qkvo"} for _ in range(num_layers)]


def layer(w, x):
    q, k, v = ((x @ w[name]).reshape(*x.shape[:2], HEADS, DIM) for name in "qkv")
    return x + jax.nn.silu(attend(q, k, v, scale=0.3).reshape(x.shape) @ w["o"])


def model(params, x):
    for w in params:
        x = layer(w, x)
    return (x,)


def run_slices(parts, leaves, inputs):
    """Runs the slices one by one with plain causal attention between them, and notes the order of events."""
    values, attended, events = dict(enumerate(inputs)), None, []
    for step in parts.slices:
        sent = []

        def send_q(q, sent=sent):
            events.append("q")
            sent.append(q)

        def send_kv(k, v, sent=sent):
            events.append("kv")
            sent.extend((k, v))

        program = parts.programs[step.program]
        reads = [values[i] for i in step.reads]
        writes = program.run([leaves[i] for i in step.weights], reads, attended, send_q=send_q, send_kv=send_kv)
        values.update(zip(step.writes, writes, strict=True))
        for i in step.drops:
            del values[i]
        attended = causal_attention(*sent, scale=0.3) if sent else None
    return [values[i] for i in parts.outputs], values, events


def check(fn, params, *inputs):
    """Cuts `fn`, runs the slices, and compares with `fn` itself. Returns the partition."""
    traced = trace(fn, params, *inputs)
    parts = cut(traced)
    leaves = [*jax.tree.leaves(params), *traced.consts]
    outputs, left, events = run_slices(parts, leaves, jax.tree.leaves(inputs))
    for got, expected in zip(outputs, fn(params, *inputs), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    assert set(left) == set(parts.outputs)
    assert events == ["q", "kv"] * len(parts.sites)
    return parts


@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_l_attends_make_l_plus_1_slices_of_3_programs(num_layers):
    parts = check(model, weights(num_layers), jnp.ones((2, 3, HIDDEN)))
    assert len(parts.slices) == num_layers + 1
    assert len(parts.programs) == min(num_layers + 1, 3)
    assert [s.program for s in parts.slices[1:-1]] == [1] * (num_layers - 1)


def test_context_of_a_slice_is_the_residual_stream():
    parts = cut(trace(model, weights(3), jnp.ones((2, 3, HIDDEN))))
    for before, after in zip(parts.slices, parts.slices[1:], strict=False):
        assert len(after.reads) == 1
        assert after.reads[0] in before.writes or after.reads[0] < parts.num_inputs


def test_programs_run_under_jit():
    params, x = weights(2), jnp.ones((1, 2, HIDDEN))
    parts = cut(trace(model, params, x))
    first = parts.programs[parts.slices[0].program]

    @jax.jit
    def run(w, reads):
        sent = []
        first.run(w, reads, None, send_q=sent.append, send_kv=lambda k, v: sent.extend((k, v)))
        return sent

    leaves = jax.tree.leaves(params)
    q, _, _ = run([leaves[i] for i in parts.slices[0].weights], [x])
    np.testing.assert_allclose(q, (x @ params[0]["q"]).reshape(1, 2, HEADS, DIM), atol=1e-6)


def test_attend_inside_calls_is_found():
    def wrapped(params, x):
        x = jax.jit(layer)(params[0], x)
        x = jax.checkpoint(layer)(params[1], x)
        return (jax.nn.relu(x),)

    assert len(check(wrapped, weights(2), jnp.ones((2, 3, HIDDEN))).sites) == 2


def test_values_used_by_many_slices_are_kept_that_long():
    def with_scale(params, x, s):
        factor = jnp.cos(s)
        for w in params:
            x = layer(w, x) * factor
        return (x, factor)

    parts = check(with_scale, weights(3), jnp.ones((2, 3, HIDDEN)), jnp.full((2, 3, HIDDEN), 0.5))
    assert len(parts.outputs) == 2


def test_closed_over_arrays_are_weights():
    table = jnp.arange(HIDDEN, dtype=jnp.float32)[None, None, :]
    traced = trace(lambda params, x: model(params, x + table), weights(1), jnp.ones((2, 3, HIDDEN)))
    assert len(traced.consts) == 1
    check(lambda params, x: model(params, x + table), weights(1), jnp.ones((2, 3, HIDDEN)))


@pytest.mark.parametrize("change", ["constant", "activation", "shape"])
def test_slices_that_differ_do_not_share_a_program(change):
    def odd_layer(w, x):
        match change:
            case "constant":
                return layer(w, x * 2.0)
            case "activation":
                return layer(w, jnp.tanh(x))
            case _:
                return layer(w, x) + layer(w, x[:, :1])

    def mixed(params, x):
        x = layer(params[0], x)
        x = layer(params[1], x)
        return (odd_layer(params[2], x),) if change != "shape" else (layer(params[2], x[:, :1]),)

    assert len(cut(trace(mixed, weights(3), jnp.ones((2, 3, HIDDEN)))).programs) == 4


def test_unsplit_runs_the_model_with_another_attention():
    params, x = weights(3), jnp.ones((2, 3, HIDDEN))
    seen = []

    def attention(index, q, k, v, *, scale):
        seen.append((index, scale))
        return causal_attention(q, k, v, scale=scale)

    (got,) = unsplit(trace(model, params, x), [*jax.tree.leaves(params), x], attention)
    np.testing.assert_allclose(got, model(params, x)[0], atol=1e-6)
    assert seen == [(0, 0.3), (1, 0.3), (2, 0.3)]


def test_no_attend_is_an_error():
    with pytest.raises(ValueError, match="never calls"):
        cut(trace(lambda params, x: (x @ params,), jnp.ones((2, 2)), jnp.ones((3, 2))))


def test_attend_under_control_flow_is_an_error_that_names_the_line():
    def scanned(params, x):
        return (jax.lax.scan(lambda x, w: (layer(w, x), None), x, params)[0],)

    stacked = jax.tree.map(lambda *w: jnp.stack(w), *weights(2))
    with pytest.raises(ValueError, match=r"inside 'scan' at .*test_cut\.py:\d+"):
        trace(scanned, stacked, jnp.ones((2, 3, HIDDEN)))


def test_attends_side_by_side_are_an_error_that_names_both():
    def parallel(params, x):
        return (layer(params[0], x) + layer(params[1], x),)

    with pytest.raises(ValueError, match=r"(?s)must follow one another.*test_cut\.py.*test_cut\.py"):
        cut(trace(parallel, weights(2), jnp.ones((2, 3, HIDDEN))))


def test_tracing_grows_gently_with_depth():
    parts = cut(trace(model, weights(80), jnp.ones((1, 1, HIDDEN))))
    assert len(parts.slices) == 81
    assert len(parts.programs) == 3
