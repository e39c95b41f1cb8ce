"""The converter on plain functions: what it cuts, what it shares, what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slices import DIM, HEADS, HIDDEN, check, layer, model, weights

from lamina_jax.attention.attend import attend, causal_attention
from lamina_jax.partition import Ports, cut, trace, unsplit


@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_l_attends_make_l_plus_1_slices_of_3_programs(num_layers):
    parts = check(model, weights(num_layers), jnp.ones((2, 3, HIDDEN)))
    assert len(parts.slices) == num_layers + 1
    assert len(parts.programs) == min(num_layers + 1, 3)
    assert [s.program for s in parts.slices[1:-1]] == [1] * (num_layers - 1)


def test_context_is_the_residual_stream_alone():
    x = jnp.ones((2, 3, HIDDEN))
    parts = check(model, weights(3), x)
    # The first slice hands on its input, which is at hand everywhere.
    assert [s.context_bytes for s in parts.slices] == [0, x.nbytes, x.nbytes, 0]


def test_programs_run_under_jit():
    params, x = weights(2), jnp.ones((1, 2, HIDDEN))
    parts = cut(trace(model, params, x))
    first = parts.programs[parts.slices[0].program]

    @jax.jit
    def run(w, reads):
        sent = []
        first.run(w, reads, Ports(lambda: x, sent.append, lambda k, v: sent.extend((k, v))))
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


def test_cheap_functions_of_the_inputs_are_computed_again_and_not_carried():
    def with_angles(params, x, s):
        factor = jnp.cos(s)
        for w in params:
            x = layer(w, x) * factor
        return (x, factor)

    x = jnp.ones((2, 3, HIDDEN))
    parts = check(with_angles, weights(3), x, jnp.full(x.shape, 0.5))
    assert len(parts.outputs) == 2
    assert [s.context_bytes for s in parts.slices[1:-1]] == [x.nbytes] * 2


def test_a_cast_is_repeated_rather_than_carried():
    def half_residual(params, x):
        for w in params:
            wide = x.astype(jnp.float32)
            x = (wide + layer(w, wide)).astype(jnp.bfloat16)
        return (x,)

    x = jnp.ones((2, 3, HIDDEN), jnp.bfloat16)
    parts = cut(trace(half_residual, weights(3), x))
    # `wide` is needed before and after each attend: naively 4 bytes a number are carried, here 2.
    assert [s.context_bytes for s in parts.slices[1:-1]] == [x.nbytes] * 2


def test_the_narrow_side_of_a_projection_is_carried():
    up = jnp.ones((2, HIDDEN))

    def narrow(params, x):
        for w in params:
            thin = jnp.tanh(layer(w, x)[:, :, :2])
            side = thin @ up  # used only after the next attend
            x = layer(w, jnp.broadcast_to(thin[:, :, :1], x.shape)) + side
        return (x,)

    x = jnp.ones((2, 3, HIDDEN))
    parts = check(narrow, weights(2), x)
    thin_bytes = x.nbytes * 2 // HIDDEN
    assert parts.slices[1].context_bytes == thin_bytes
    assert parts.slices[3].context_bytes == thin_bytes


def test_a_product_of_matrices_is_never_repeated():
    def reused(params, x):
        wide = x @ params[0]["o"]
        x = layer(params[0], wide)
        return (x + wide,)

    x = jnp.ones((2, 3, HIDDEN))
    parts = check(reused, weights(1), x)
    assert parts.slices[0].context_bytes == x.nbytes
    dots = [e for s in parts.slices for e in _eqns(parts.programs[s.program]) if e.primitive.name == "dot_general"]
    assert len(dots) == 1 + 4


def test_what_can_run_before_the_answer_does():
    def independent(params, x):
        y = layer(params[0], x)
        return (y + jnp.exp(x),)

    parts = check(independent, weights(1), jnp.ones((2, 3, HIDDEN)))
    last = parts.programs[parts.slices[1].program]
    assert [e.primitive.name for e in last.before_attended] == ["exp"]


def _eqns(program):
    return [*program.before_attended, *program.before_q, *program.before_kv, *program.rest]


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

    def attention(index, q, k, v, **params):
        seen.append((index, params["scale"]))
        return causal_attention(q, k, v, **params)

    traced = trace(model, params, x)
    (got,) = unsplit(traced, traced.weights(jax.tree.leaves(params)), [x], attention)
    np.testing.assert_allclose(got, model(params, x)[0], atol=1e-6)
    assert seen == [(0, 0.3), (1, 0.3), (2, 0.3)]


def without_attend(params, x):
    return (x @ params[0]["q"],)


def with_an_unused_attend(params, x):
    layer(params[0], x)
    return (x,)


class Callable:
    def __call__(self, params, x):
        return without_attend(params, x)


@pytest.mark.parametrize("fn", [without_attend, with_an_unused_attend])
@pytest.mark.parametrize("wrapped", [lambda fn: fn, jax.jit, functools.partial], ids=["plain", "jit", "partial"])
def test_no_attend_is_an_error_that_names_the_model(fn, wrapped):
    line = fn.__code__.co_firstlineno
    with pytest.raises(ValueError, match=rf"test_cut\.py:{line} \({fn.__name__}\) never calls"):
        cut(trace(wrapped(fn), weights(1), jnp.ones((2, 3, HIDDEN))))


def test_no_attend_in_an_object_is_an_error_that_names_its_class():
    with pytest.raises(ValueError, match=r"test_cut\.py:\d+ \(Callable\.__call__\) never calls"):
        cut(trace(Callable(), weights(1), jnp.ones((2, 3, HIDDEN))))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_over_layers_is_unrolled_and_its_slices_share_programs(reverse):
    def scanned(params, x):
        def body(x, w):
            return layer(w, x), x[:, 0]

        x, firsts = jax.lax.scan(jax.checkpoint(body), x, params, reverse=reverse)
        return (x, firsts)

    x = jnp.ones((2, 3, HIDDEN))
    stacked = jax.tree.map(lambda *w: jnp.stack(w), *weights(4))
    parts = check(lambda params, x: scanned(params, x)[:1], stacked, x)
    assert len(parts.sites) == 4
    assert len(parts.programs) == 3
    assert [s.context_bytes for s in parts.slices[1:-1]] == [x.nbytes] * 3
    check(scanned, stacked, x)


def branch(params, x):
    return (jax.lax.cond(x[0, 0, 0] > 0, layer, lambda w, x: x, params[0], x),)


def switch(params, x):
    return (jax.lax.switch(jnp.int32(x[0, 0, 0]), [lambda x: x, lambda x: layer(params[0], x)], x),)


def loop(params, x):
    return (jax.lax.while_loop(lambda x: x[0, 0, 0] < 9, lambda x: layer(params[0], x), x),)


def loop_as_often_as_data_says(params, x):
    return (jax.lax.fori_loop(0, jnp.int32(x[0, 0, 0]), lambda _, x: layer(params[0], x), x),)


def branch_in_a_call(params, x):
    inner = jax.jit(jax.checkpoint(lambda x: jax.lax.cond(x[0, 0, 0] > 0, lambda x: layer(params[0], x), jnp.abs, x)))
    return (inner(x),)


@pytest.mark.parametrize(
    ("fn", "construct"),
    [
        (branch, "cond"),
        (switch, "cond"),
        (loop, "while"),
        (loop_as_often_as_data_says, "while"),
        (branch_in_a_call, "cond"),
    ],
)
def test_attend_that_may_not_run_is_an_error_that_names_the_line(fn, construct):
    line = fn.__code__.co_firstlineno + 1
    with pytest.raises(ValueError, match=rf"inside '{construct}' at .*test_cut\.py:{line}\b"):
        trace(fn, weights(1), jnp.ones((2, 3, HIDDEN)))


def test_branch_in_a_scan_over_layers_is_an_error_that_names_the_line():
    def body(x, w):
        return jax.lax.cond(x[0, 0, 0] > 0, layer, lambda w, x: x, w, x), None

    stacked = jax.tree.map(lambda *w: jnp.stack(w), *weights(2))
    line = body.__code__.co_firstlineno + 1
    with pytest.raises(ValueError, match=rf"inside 'cond' at .*test_cut\.py:{line}\b"):
        trace(lambda params, x: jax.lax.scan(body, x, params)[:1], stacked, jnp.ones((2, 3, HIDDEN)))


# Each does on its first line what cannot be traced.
DATA_DEPENDENT = {
    "boolean index": lambda params, x, n: model(params, x[x > 0]),
    "branch": lambda params, x, n: model(params, x) if n > 0 else (x,),
    "nonzero": lambda params, x, n: model(params, x + jnp.nonzero(x)[0].sum()),
    "length of a slice": lambda params, x, n: model(params, x[:, :n]),
    "length of a range": lambda params, x, n: model(params, x + jnp.arange(n).sum()),
    "shape": lambda params, x, n: model(params, x + jnp.zeros((n,)).sum()),
    "reshape": lambda params, x, n: model(params, x.reshape(n, -1, HIDDEN)),
    "number of layers": lambda params, x, n: model([params[i] for i in range(n)], x),
    "choice of a layer": lambda params, x, n: model([params[n]], x),
    "integer": lambda params, x, n: model(params, x * int(n)),
    "NumPy array": lambda params, x, n: model(params, x * np.asarray(n)),
}


@pytest.mark.parametrize("kind", DATA_DEPENDENT)
def test_data_dependence_is_an_error_that_names_the_line(kind):
    fn = DATA_DEPENDENT[kind]
    line = fn.__code__.co_firstlineno
    with pytest.raises(ValueError, match=rf"test_cut\.py:{line} a shape or a branch depends on data"):
        trace(fn, weights(1), jnp.ones((2, 3, HIDDEN)), jnp.int32(1))


@pytest.mark.parametrize(
    ("fn", "error"),
    [
        (lambda params, x: model(params, x @ x), TypeError),
        (lambda params, x: model([params[7]], x), IndexError),
        (lambda params, x: model(params, x[:, :, :, :3]), IndexError),
    ],
)
def test_other_mistakes_of_a_model_are_shown_as_they_are(fn, error):
    with pytest.raises(error) as caught:
        trace(fn, weights(1), jnp.ones((2, 3, HIDDEN)))
    assert "depends on data" not in str(caught.value)


def test_attends_side_by_side_are_an_error_that_names_both():
    def parallel(params, x):
        return (layer(params[0], x) + layer(params[1], x),)

    with pytest.raises(ValueError, match=r"(?s)must follow one another.*slices\.py:\d+.*slices\.py:\d+"):
        cut(trace(parallel, weights(2), jnp.ones((2, 3, HIDDEN))))


def test_tracing_grows_gently_with_depth():
    parts = cut(trace(model, weights(80), jnp.ones((1, 1, HIDDEN))))
    assert len(parts.slices) == 81
    assert len(parts.programs) == 3


def nested_constant(wrap):
    """Layers that differ in nothing but an array, closed over by a function inside a loop or a branch."""
    tables = [np.full((1, 4), 1.0 + i, np.float32) for i in range(3)]
    scaled = [jax.jit(lambda x, table=table: x * jnp.asarray(table)) for table in tables]

    def model(w, x):
        for function in scaled:
            q = (x @ w)[:, None, None, :]
            x = x + attend(q, q, q, scale=1.0)[:, 0, 0]
            x = wrap(function, x)
        return (x,)

    return model


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f, x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0],
        lambda f, x: jax.lax.fori_loop(0, 2, lambda _, c: f(c), x),
        lambda f, x: jax.lax.while_loop(lambda c: c[0, 0] < -1e9, f, f(x)),
        lambda f, x: jax.lax.cond(x[0, 0] > 1e9, lambda c: c, f, x),
    ],
    ids=["scan", "fori_loop", "while_loop", "cond"],
)
def test_slices_that_differ_in_a_nested_constant_do_not_share_a_program(wrap):
    shapes = (jax.ShapeDtypeStruct((4, 4), jnp.float32), jax.ShapeDtypeStruct((2, 4), jnp.float32))
    parts = cut(trace(nested_constant(wrap), *shapes))
    # The first slice has no loop yet.
    assert len({s.program for s in parts.slices}) == len(parts.slices) == 4


@pytest.mark.parametrize("constant", [False, True], ids=["weight", "constant"])
def test_output_that_is_given_is_refused(constant):
    given = np.ones((3,), np.float32)

    def model(w, x):
        q = x[:, None, None, :]
        return attend(q, q, q, scale=1.0), jnp.asarray(given) if constant else w

    with pytest.raises(ValueError, match="output of the model does not depend on its inputs"):
        cut(trace(model, jax.ShapeDtypeStruct((3,), jnp.float32), jax.ShapeDtypeStruct((2, 4), jnp.float32)))
