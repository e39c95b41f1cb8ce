"""A function that calls `attend`, as one flat list of equations."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex_core
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

AttendHandler = Callable[..., jax.Array]
"""``handler(layer, q, k, v, scale=...) -> attended``; `layer` counts the attends of the function from 0."""


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """A traced function ``f(params, *inputs) -> tuple of arrays``.

    The jaxpr is flat: calls are inlined, so that every equation and every `attend` stands at the top level. Its
    arguments are the leaves of `params`, then of `inputs`, in pytree order; closed-over arrays are `consts`.
    """

    jaxpr: Jaxpr
    consts: tuple[Any, ...]
    num_params: int


def trace(fn: Callable[..., Sequence[jax.Array]], params: Any, *inputs: Any) -> Traced:
    """Traces ``fn(params, *inputs)``.

    Args:
        fn: returns a flat sequence of arrays; calls `attend` at its top level or inside `jit`, `jax.checkpoint` or
            custom derivative rules.
        params: pytree of weights (arrays or `jax.ShapeDtypeStruct`).
        inputs: pytrees of arrays or `jax.ShapeDtypeStruct`.

    Raises:
        ValueError: `attend` is called under control flow (scan, while, cond, vmap of one of them ...), where it
            cannot be cut; names the construct and its source line.
    """
    leaves, tree = jax.tree.flatten((params, inputs))
    closed = jax.make_jaxpr(lambda *flat: _apply(fn, tree, flat))(*leaves)
    flat = jax.make_jaxpr(lambda *args: evaluate(closed.jaxpr, closed.consts, args))(*leaves)
    return Traced(jaxpr=flat.jaxpr, consts=tuple(flat.consts), num_params=len(jax.tree.leaves(params)))


def _apply(fn: Callable, tree, leaves: Sequence[Any]) -> Sequence[jax.Array]:
    params, inputs = jax.tree.unflatten(tree, leaves)
    return fn(params, *inputs)


def evaluate(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Runs `jaxpr`, calls inlined. Under `jax.make_jaxpr` this flattens it."""
    env: dict[Var, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    for eqn in jaxpr.eqns:
        name = _INLINED.get(eqn.primitive.name)
        if name is None:
            _refuse_nested_attend(eqn)
            evaluate_eqn(eqn, env)
            continue
        inner = eqn.params[name]
        inner, inner_consts = (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())
        outs = evaluate(inner, inner_consts, [read(env, v) for v in eqn.invars])
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(env, v) for v in jaxpr.outvars]


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


def unsplit(traced: Traced, args: Sequence[Any], attend: AttendHandler) -> list[jax.Array]:
    """Runs the whole function in one program with `attend` standing in for the primitive.

    This is the model as it was before any cut: the oracle of the split run. Nothing may fuse across the attends
    (an optimization barrier stands at each side), because nothing can across the slices of a split run; the two
    then round alike.
    """
    jaxpr = traced.jaxpr
    env: dict[Var, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*traced.consts, *args), strict=True))
    layer = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive is not attend_p:
            evaluate_eqn(eqn, env)
            continue
        q, k, v = jax.lax.optimization_barrier(tuple(read(env, v) for v in eqn.invars))
        env[eqn.outvars[0]] = jax.lax.optimization_barrier(attend(layer, q, k, v, **eqn.params))
        layer += 1
    return [read(env, v) for v in jaxpr.outvars]


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
