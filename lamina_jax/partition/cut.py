"""The converter: a traced model with L attends becomes L + 1 slices, of which equal ones share a program.

Slice 0 ends with q, k, v of the first attend; slice i begins with the output of attend i - 1; slice L ends with the
model's outputs (Chen et al., arXiv 2405.01814v2, section 4.1). An equation belongs to the slice given by the number
of attends that it depends on, and every value that a later slice reads is context, kept by whoever runs the slices.

Inside a slice the equations come in the order in which others wait for them: what q needs, then what k and v need,
then the rest.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from lamina_jax.attention.attend import attend_p
from lamina_jax.partition.trace import Traced, evaluate_eqn, read, source_line


@dataclasses.dataclass(frozen=True)
class AttendSite:
    """What one attend takes: the shapes that travel, and its parameters."""

    q: ShapedArray
    """[batch, tokens, num_heads, head_dim]"""
    kv: ShapedArray
    """[batch, tokens, num_kv_heads, head_dim], of k and of v"""
    scale: float


@dataclasses.dataclass(frozen=True, eq=False)
class SliceProgram:
    """The computation of one or more structurally equal slices, as a function of weights and context."""

    before_q: tuple[JaxprEqn, ...]
    before_kv: tuple[JaxprEqn, ...]
    rest: tuple[JaxprEqn, ...]
    weights: tuple[Var, ...]
    reads: tuple[Var, ...]
    attended: Var | None
    attends: tuple[Var, Var, Var] | None
    writes: tuple[Var, ...]

    def run(
        self,
        weights: Sequence[jax.Array],
        reads: Sequence[jax.Array],
        attended: jax.Array | None,
        *,
        send_q: Callable[[jax.Array], None],
        send_kv: Callable[[jax.Array, jax.Array], None],
    ) -> list[jax.Array]:
        """Runs the slice, handing q, then k and v on as soon as each can be had.

        Args:
            weights, reads: in the order of `Slice.weights` and `Slice.reads`.
            attended: output of the attend before this slice; None for the first.
            send_q, send_kv: called once each, except in the last slice.

        Returns:
            The values that the slice writes, in the order of `Slice.writes`.
        """
        env: dict[Var, Any] = dict(zip((*self.weights, *self.reads), (*weights, *reads), strict=True))
        if self.attended is not None:
            env[self.attended] = attended
        _evaluate_all(self.before_q, env)
        if self.attends is not None:
            send_q(read(env, self.attends[0]))
        _evaluate_all(self.before_kv, env)
        if self.attends is not None:
            send_kv(read(env, self.attends[1]), read(env, self.attends[2]))
        _evaluate_all(self.rest, env)
        return [env[v] for v in self.writes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """One slice: which program, on which weights, between which values."""

    program: int
    """Index into `Partition.programs`."""
    weights: tuple[int, ...]
    """Indices into the leaves of `params`, followed by `Traced.consts`."""
    reads: tuple[int, ...]
    """Values read: numbers below `Partition.num_inputs` are inputs of the step, others were written before."""
    writes: tuple[int, ...]
    """Values written for later slices or as outputs."""
    drops: tuple[int, ...]
    """Values that nobody reads after this slice."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Partition:
    """A model cut at its attends."""

    programs: tuple[SliceProgram, ...]
    slices: tuple[Slice, ...]
    sites: tuple[AttendSite, ...]
    """The attends in order; `slices` has one more."""
    num_inputs: int
    outputs: tuple[int, ...]
    """Values that are the model's outputs."""


def cut(traced: Traced) -> Partition:
    """Cuts a traced model at each attend.

    Raises:
        ValueError: there is no attend; two attends do not depend on one another, so that they cannot follow each
            other as layers do (names their source lines); or an output is a constant.
    """
    jaxpr = traced.jaxpr
    eqns = _needed(jaxpr.eqns, jaxpr.outvars)
    stages = _stages(eqns)
    attends = _attend_chain(eqns, stages)
    weight_vars = (*jaxpr.invars[: traced.num_params], *jaxpr.constvars)
    input_vars = tuple(jaxpr.invars[traced.num_params :])
    if any(isinstance(v, Literal) for v in jaxpr.outvars):
        raise ValueError("An output of the model does not depend on its inputs; it cannot be produced by a slice.")

    body: list[list[JaxprEqn]] = [[] for _ in range(len(attends) + 1)]
    for eqn in _without(eqns, attends):
        body[stages[eqn.outvars[0]]].append(eqn)
    weight_index = {v: i for i, v in enumerate(weight_vars)}
    programs: dict[str, SliceProgram] = {}
    plans: list[tuple[int, SliceProgram]] = []
    for i, slice_eqns in enumerate(body):
        before = attends[i - 1].outvars[0] if i else None
        after = attends[i] if i < len(attends) else None
        program = _slice_program(slice_eqns, weight_index, before, after, _read_elsewhere(i, body, attends, jaxpr))
        key = _structure(program)
        programs.setdefault(key, program)
        plans.append((list(programs).index(key), program))

    values = {v: i for i, v in enumerate(input_vars)}
    for _, program in plans:
        for v in program.writes:
            values.setdefault(v, len(values))
    outputs = tuple(values[v] for v in _variables(jaxpr.outvars))
    return Partition(
        programs=tuple(programs.values()),
        slices=_slices(plans, weight_index, values, outputs),
        sites=tuple(_site(e) for e in attends),
        num_inputs=len(input_vars),
        outputs=outputs,
    )


def _evaluate_all(eqns: Iterable[JaxprEqn], env: dict[Var, Any]) -> None:
    for eqn in eqns:
        evaluate_eqn(eqn, env)


def _variables(atoms: Iterable[Var | Literal]) -> list[Var]:
    return [a for a in atoms if not isinstance(a, Literal)]


def _needed(eqns: Sequence[JaxprEqn], targets: Iterable[Var | Literal]) -> list[JaxprEqn]:
    """The equations that `targets` depend on, in their order."""
    wanted, kept = set(_variables(targets)), []
    for eqn in reversed(eqns):
        if wanted.intersection(eqn.outvars):
            wanted.update(_variables(eqn.invars))
            kept.append(eqn)
    return kept[::-1]


def _without(eqns: Sequence[JaxprEqn], others: Sequence[JaxprEqn]) -> list[JaxprEqn]:
    gone = set(map(id, others))
    return [e for e in eqns if id(e) not in gone]


def _stages(eqns: Sequence[JaxprEqn]) -> dict[Var, int]:
    """For every variable, how many attends in a row it depends on."""
    stages: dict[Var, int] = {}
    for eqn in eqns:
        stage = max((stages.get(v, 0) for v in _variables(eqn.invars)), default=0)
        stage += eqn.primitive is attend_p
        stages.update((v, stage) for v in eqn.outvars)
    return stages


def _attend_chain(eqns: Sequence[JaxprEqn], stages: dict[Var, int]) -> list[JaxprEqn]:
    attends = [e for e in eqns if e.primitive is attend_p]
    if not attends:
        raise ValueError("The model never calls lamina_jax.attention.attend, so there is nowhere to cut it.")
    for i, eqn in enumerate(attends):
        if stages[eqn.outvars[0]] != i + 1:
            raise ValueError(
                f"Attends must follow one another, each depending on the one before; the one at {source_line(eqn)} "
                f"does not depend on the one at {source_line(attends[i - 1])}."
            )
    return attends


def _read_elsewhere(i: int, body: list[list[JaxprEqn]], attends: list[JaxprEqn], jaxpr: Jaxpr) -> set[Var]:
    """Variables that something outside slice i reads as context: later slices, or the caller."""
    later = {v for eqns in body[i + 1 :] for e in eqns for v in _variables(e.invars)}
    later.update(v for e in attends[i + 1 :] for v in _variables(e.invars))
    return later.union(_variables(jaxpr.outvars))


def _slice_program(
    eqns: list[JaxprEqn], weight_index: dict[Var, int], attended: Var | None, attend: JaxprEqn | None, wanted: set[Var]
) -> SliceProgram:
    targets = _variables(attend.invars) if attend else []
    before_q = _needed(eqns, targets[:1])
    before_kv = _without(_needed(eqns, targets), before_q)
    rest = _without(eqns, [*before_q, *before_kv])
    ordered = [*before_q, *before_kv, *rest]
    made = dict.fromkeys(v for e in ordered for v in e.outvars)
    free = [v for e in ordered for v in _variables(e.invars)] + targets
    free = [v for v in dict.fromkeys(free) if v not in made and v is not attended]
    writes = [v for v in made if v in wanted]
    if attended in wanted:
        writes.append(attended)
    return SliceProgram(
        before_q=tuple(before_q),
        before_kv=tuple(before_kv),
        rest=tuple(rest),
        weights=tuple(v for v in free if v in weight_index),
        reads=tuple(v for v in free if v not in weight_index),
        attended=attended,
        attends=(targets[0], targets[1], targets[2]) if attend else None,
        writes=tuple(writes),
    )


def _slices(
    plans: list[tuple[int, SliceProgram]],
    weight_index: dict[Var, int],
    values: dict[Var, int],
    outputs: tuple[int, ...],
) -> tuple[Slice, ...]:
    slices: list[Slice] = []
    alive = set(outputs)
    for index, program in reversed(plans):
        reads = tuple(values[v] for v in program.reads)
        writes = tuple(values[v] for v in program.writes)
        slices.append(
            Slice(
                program=index,
                weights=tuple(weight_index[v] for v in program.weights),
                reads=reads,
                writes=writes,
                drops=tuple(sorted({*reads, *writes} - alive)),
            )
        )
        alive.update(reads)
    return tuple(reversed(slices))


def _site(eqn: JaxprEqn) -> AttendSite:
    q, k, _ = eqn.invars
    return AttendSite(q=q.aval, kv=k.aval, scale=eqn.params["scale"])  # pyright: ignore[reportArgumentType]


def _structure(program: SliceProgram) -> str:
    """A digest that two programs share exactly if they differ in nothing but the names of variables."""
    names: dict[Var, int] = {}
    digest = hashlib.sha256()

    def note(*parts: Any) -> None:
        digest.update(repr(parts).encode())

    def name(atom: Var | Literal) -> Any:
        if isinstance(atom, Literal):
            return ("literal", str(atom.aval), np.asarray(atom.val).tobytes())
        return (names.setdefault(atom, len(names)), str(atom.aval))

    for group in (program.weights, program.reads, [program.attended] if program.attended else []):
        note("arguments", [name(v) for v in group])
    for group in (program.before_q, program.before_kv, program.rest):
        for eqn in group:
            operands, params = [name(v) for v in eqn.invars], _frozen(eqn.params)
            note(eqn.primitive.name, params, operands, [name(v) for v in eqn.outvars])
        note("end of group")
    note("attends", [name(v) for v in program.attends or ()], "writes", [name(v) for v in program.writes])
    return digest.hexdigest()


def _frozen(param: Any) -> Any:
    """Something whose repr stands for an equation's parameter by value, arrays included."""
    match param:
        case ClosedJaxpr():
            return (str(param.jaxpr), _frozen(param.consts))
        case dict():
            return [(key, _frozen(value)) for key, value in sorted(param.items())]
        case list() | tuple():
            return [_frozen(value) for value in param]
        case np.ndarray() | jax.Array():
            array = np.asarray(param)
            return (str(array.dtype), array.shape, array.tobytes())
        case _:
            return (type(param).__name__, str(param))
