"""Which values to carry from one slice to the next: a minimum cut, weighted by bytes.

Chen et al., arXiv 2405.01814v2, section 4.1: remove the attend, and take the minimum-weight cut between what feeds it
and what it feeds. A value is a node split in two, joined by an edge as heavy as its bytes, which is cut if the value is
carried; what is computed from it hangs on the second half by edges that cannot be cut. Weights, constants and inputs of
the step are at hand everywhere and cost nothing.

A later slice may compute for itself whatever it can from what was carried. It may repeat what an earlier slice did
too, but only where that is cheap: a cast, a broadcast, arithmetic element by element, never a product of matrices.
"""

import math
from collections.abc import Collection, Iterable, Mapping

import networkx as nx
from jax.extend.core import JaxprEqn, Literal, Var

_SOURCE, _SINK = "source", "sink"

# Primitives that may run twice: reading and writing their values costs less than sending them.
_REPEATABLE = frozenset(
    [
        "abs",
        "add",
        "and",
        "broadcast_in_dim",
        "ceil",
        "clamp",
        "concatenate",
        "convert_element_type",
        "copy",
        "cos",
        "div",
        "eq",
        "exp",
        "exp2",
        "expand_dims",
        "floor",
        "ge",
        "gt",
        "integer_pow",
        "iota",
        "is_finite",
        "le",
        "log",
        "log1p",
        "logistic",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "not",
        "or",
        "pow",
        "reshape",
        "rsqrt",
        "select_n",
        "sign",
        "sin",
        "slice",
        "split",
        "sqrt",
        "square",
        "squeeze",
        "stack",
        "sub",
        "tanh",
        "transpose",
    ]
)


def variables(atoms: Iterable[Var | Literal]) -> list[Var]:
    """The atoms that are variables."""
    return [a for a in atoms if not isinstance(a, Literal)]


def nbytes(variable: Var) -> int:
    """Size of a variable's value in bytes."""
    aval = variable.aval
    return math.prod(aval.shape) * aval.dtype.itemsize  # pyright: ignore[reportAttributeAccessIssue]


def values_to_carry(
    *,
    makers: Mapping[Var, JaxprEqn],
    wanted: Collection[Var],
    present: Collection[Var],
    free: Collection[Var],
    computed: Collection[JaxprEqn],
) -> list[Var]:
    """The set of values with the fewest bytes from which `wanted` can be computed.

    Args:
        makers: the equation that makes each variable.
        wanted: what later slices read, none of which depends on the attend between.
        present: what the slice before the attend is given, and cannot be computed again: its context, and the output
            of the attend before it.
        free: weights, constants and inputs, which every slice has.
        computed: equations that run before the attend in any case, because it depends on them.

    Returns:
        The variables to carry, in no particular order.
    """
    graph = nx.DiGraph()
    once = {id(e) for e in computed if e.primitive.name not in _REPEATABLE}
    seen: set[Var] = set()
    stack = [v for v in wanted if v not in free]
    for v in stack:
        graph.add_edge((v, "out"), _SINK)
    while stack:
        v = stack.pop()
        if v in seen:
            continue
        seen.add(v)
        graph.add_edge((v, "in"), (v, "out"), capacity=nbytes(v))
        if v in present or id(makers[v]) in once:
            graph.add_edge(_SOURCE, (v, "in"))
        if v in present:
            continue
        for u in variables(makers[v].invars):
            if u not in free:
                graph.add_edge((u, "out"), (v, "in"))
                stack.append(u)
    if _SOURCE not in graph or _SINK not in graph:
        return []
    _, (near, _) = nx.minimum_cut(graph, _SOURCE, _SINK)
    return [v for v in seen if (v, "in") in near and (v, "out") not in near]
