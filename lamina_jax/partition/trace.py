"""A function that calls `attend`, as one flat list of equations."""

import dataclasses
import functools
import inspect
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from lamina_jax.attention.attend import attend_p

# Calls that only group equations: primitive name -> the parameter that holds the jaxpr called.
_INLINED = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}

# What an unrolled scan does to the weights of all layers to get those of one.
_CUTS = ("slice", "squeeze")

_DATA_DEPENDENT = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
# For these JAX has no class of error: a traced number in a shape, and in the bounds of a slice.
_DATA_DEPENDENT_MESSAGES = (
    "Shapes must be 1D sequences of concrete values",
    "Array slice indices must have static start/stop/step",
)

AttendHandler = Callable[..., jax.Array]
"""``handler(layer, q, k, v, scale=..., window=..., soft_cap=...) -> attended``, as `attend` is called; `layer` counts
the attends of the function from 0."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Traced:
    """A traced function ``f(params, *inputs) -> tuple of arrays``, as a flat list of equations.

    Calls are inlined and scans over layers unrolled, so every equation and every `attend` stands at the top level.
    """

    eqns: tuple[JaxprEqn, ...]
    weight_vars: tuple[Var, ...]
    """The leaves of `params`, then closed-over arrays, then pieces of both that `prepare` makes."""
    input_vars: tuple[Var, ...]
    """The leaves of `inputs`."""
    outvars: tuple[Var | Literal, ...]
    consts: tuple[Any, ...]
    """The closed-over arrays."""
    source: str
    """``file:line (name)`` where the function is defined, for errors about it as a whole."""
    prepare: tuple[JaxprEqn, ...]
    """What is only cut out of weights, as an unrolled scan does with the weights of each layer: done once, and not
    in every step. Empty for most models."""

    def weights(self, params: Sequence[jax.Array]) -> list[jax.Array]:
        """The values of `weight_vars`, given the leaves of `params`."""
        whole = [*params, *map(jnp.asarray, self.consts)]
        env: dict[Var, Any] = dict(zip(self.weight_vars, whole, strict=False))
        for eqn in self.prepare:
            evaluate_eqn(eqn, env)
        return [env[v] for v in self.weight_vars]


def trace(
    fn: Callable[..., Sequence[jax.Array]], params: Any, *inputs: Any, axes: Sequence[tuple[str, int]] = ()
) -> Traced:
    """Traces ``fn(params, *inputs)``.

    Args:
        fn: returns a flat sequence of arrays; calls `attend` at its top level or inside `jit`, `jax.checkpoint`,
            custom derivative rules, or a `scan` (also as a `fori_loop` with fixed bounds), which is unrolled.
        params: pytree of weights (arrays or `jax.ShapeDtypeStruct`).
        inputs: pytrees of arrays or `jax.ShapeDtypeStruct`.
        axes: names and sizes of mesh axes over which the function communicates; what comes of the trace is then to be
            run under `jax.shard_map` over them.

    Raises:
        ValueError: `attend` is called under control flow that may or may not run it (while, cond, switch), where it
            cannot be cut, and names the construct and its source line; or a shape or a branch depends on data, and
            names the line.
    """
    leaves, tree = jax.tree.flatten((params, inputs))
    try:
        closed = jax.make_jaxpr(lambda *flat: _apply(fn, tree, flat), axis_env=list(axes))(*leaves)
    except Exception as error:
        if not _depends_on_data(error):
            raise
        raise ValueError(
            f"The model cannot be traced: at {_users_line(error)} a shape or a branch depends on data, which is known "
            f"only when a step runs. Use fixed shapes and jnp.where. ({str(error).splitlines()[0]})"
        ) from error
    flat = jax.make_jaxpr(lambda *args: evaluate(closed.jaxpr, closed.consts, args), axis_env=list(axes))(*leaves)
    return _hoist(flat.jaxpr, tuple(flat.consts), len(jax.tree.leaves(params)), source=_definition(fn))


def _apply(fn: Callable, tree, leaves: Sequence[Any]) -> Sequence[jax.Array]:
    params, inputs = jax.tree.unflatten(tree, leaves)
    return fn(params, *inputs)


def evaluate(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Runs `jaxpr`, calls inlined. Under `jax.make_jaxpr` this flattens it."""
    env: dict[Var, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    for eqn in jaxpr.eqns:
        name = _INLINED.get(eqn.primitive.name)
        if name is not None:
            outs = _call(eqn.params[name], [read(env, v) for v in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        elif eqn.primitive.name == "scan" and any(map(_holds_attend, jex_core.jaxprs_in_params(eqn.params))):
            outs = _unrolled(eqn, [read(env, v) for v in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        else:
            _refuse_nested_attend(eqn)
            evaluate_eqn(eqn, env)
    return [read(env, v) for v in jaxpr.outvars]


def _call(inner: ClosedJaxpr | Jaxpr, args: Sequence[Any]) -> list[Any]:
    if isinstance(inner, ClosedJaxpr):
        return evaluate(inner.jaxpr, inner.consts, args)
    return evaluate(inner, (), args)


def _unrolled(eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
    """The results of a scan, its steps written out."""
    body, length, outputs = eqn.params["jaxpr"], eqn.params["length"], eqn.params["ft_out"]
    consts, carry, xs = map(list, eqn.params["ft_in"].update(args).unpack())
    steps = reversed(range(length)) if eqn.params["reverse"] else range(length)
    ys: dict[int, list[Any]] = {}
    for i in steps:
        outs = _call(body, [*consts, *carry, *(jax.lax.index_in_dim(x, i, keepdims=False) for x in xs)])
        carry, ys[i] = map(list, outputs.update(outs).unpack())
    return [*carry, *(jnp.stack(column) for column in zip(*(ys[i] for i in range(length)), strict=True))]


def read(env: dict[Var, Any], atom: Var | Literal) -> Any:
    """The value of a variable or literal."""
    return atom.val if isinstance(atom, Literal) else env[atom]


def evaluate_eqn(eqn: JaxprEqn, env: dict[Var, Any]) -> None:
    """Binds one equation and puts its results into `env`; it keeps its source line and name scope."""
    source = eqn.source_info
    scope = source_info_util.current_name_stack() + source.name_stack
    with source_info_util.user_context(source.traceback, name_stack=scope), eqn.ctx.manager:
        bind_params = eqn.primitive.get_bind_params(eqn.params)
        outs = eqn.primitive.bind(*(read(env, v) for v in eqn.invars), **bind_params)
    env.update(zip(eqn.outvars, outs if eqn.primitive.multiple_results else [outs], strict=True))


def unsplit(traced: Traced, weights: Sequence[Any], inputs: Sequence[Any], attend: AttendHandler) -> list[jax.Array]:
    """Runs the whole function in one program with `attend` standing in for the primitive.

    This is the model as it was before any cut: the oracle of the split run. Nothing may fuse across the attends
    (an optimization barrier stands at each side), because nothing can across the slices of a split run; the two
    then round alike.

    Args:
        weights: as `Traced.weights` makes them.
        inputs: the leaves of the function's inputs.
    """
    variables = (*traced.weight_vars, *traced.input_vars)
    env: dict[Var, Any] = dict(zip(variables, (*weights, *inputs), strict=True))
    layer = 0
    for eqn in traced.eqns:
        if eqn.primitive is not attend_p:
            evaluate_eqn(eqn, env)
            continue
        q, k, v = jax.lax.optimization_barrier(tuple(read(env, v) for v in eqn.invars))
        env[eqn.outvars[0]] = jax.lax.optimization_barrier(attend(layer, q, k, v, **eqn.params))
        layer += 1
    return [read(env, v) for v in traced.outvars]


def _hoist(jaxpr: Jaxpr, consts: tuple[Any, ...], num_params: int, *, source: str) -> Traced:
    """Takes what is only cut out of weights out of the equations, see `Traced.prepare`."""
    weights = [*jaxpr.invars[:num_params], *jaxpr.constvars]
    cut_out, prepare, rest = set(weights), [], []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _CUTS and all(v in cut_out for v in eqn.invars):
            cut_out.update(eqn.outvars)
            prepare.append(eqn)
        else:
            rest.append(eqn)
    read_later = {v for e in rest for v in e.invars if not isinstance(v, Literal)}
    return Traced(
        eqns=tuple(rest),
        weight_vars=(*weights, *(v for e in prepare for v in e.outvars if v in read_later)),
        input_vars=tuple(jaxpr.invars[num_params:]),
        outvars=tuple(jaxpr.outvars),
        consts=consts,
        source=source,
        prepare=tuple(prepare),
    )


def _depends_on_data(error: Exception) -> bool:
    """Whether JAX refuses to trace because a Python value was asked of an array."""
    return isinstance(error, _DATA_DEPENDENT) or str(error).startswith(_DATA_DEPENDENT_MESSAGES)


def _definition(fn: Callable[..., Any]) -> str:
    """``file:line (name)`` of a function, seen through wrappers and partial applications; of an object, its class's
    `__call__`."""
    inner = inspect.unwrap(fn)
    while isinstance(inner, functools.partial):
        inner = inspect.unwrap(inner.func)
    code = getattr(inner, "__code__", None) or getattr(inspect.unwrap(type(inner).__call__), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno} ({code.co_qualname})" if code else repr(fn)


def _users_line(error: Exception) -> str:
    """``file:line`` of the innermost frame of the user's code in an error's traceback."""
    libraries = (str(Path(jax.__file__).parent), str(Path(__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(libraries)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown line"


def source_line(eqn: JaxprEqn) -> str:
    """``file:line (function)`` of the user's code that made `eqn`, as far as JAX knows."""
    return source_info_util.summarize(eqn.source_info)


def _refuse_nested_attend(eqn: JaxprEqn) -> None:
    if any(_holds_attend(inner) for inner in jex_core.jaxprs_in_params(eqn.params)):
        raise ValueError(
            f"attend is called inside {eqn.primitive.name!r} at {source_line(eqn)}, where the model cannot be cut. "
            "Call it from straight-line code: unroll a loop over layers in Python, and keep it out of branches."
        )


def _holds_attend(jaxpr: Jaxpr) -> bool:
    return any(
        eqn.primitive is attend_p or any(map(_holds_attend, jex_core.jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )
