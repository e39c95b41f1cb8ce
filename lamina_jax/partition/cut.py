"""The converter: a traced model with L attends becomes L + 1 slices, of which equal ones share a program.

Slice 0 ends with q, k, v of the first attend; slice i begins with the output of attend i - 1; slice L ends with the
model's outputs (Chen et al., arXiv 2405.01814v2, section 4.1). What a later slice needs of an earlier one is its
context: the values of a minimum cut (`lamina_jax.partition.mincut`), kept by whoever runs the slices.

Inside a slice the equations come in the order in which others wait for them: what can run before the attend's output
is there, what q needs, what k and v need, then the rest.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from lamina_jax.attention.attend import attend_p
from lamina_jax.attention.params import AttendParams
from lamina_jax.partition.mincut import nbytes, values_to_carry, variables
from lamina_jax.partition.trace import Traced, evaluate_eqn, read, source_line


@dataclasses.dataclass(frozen=True)
class AttendSite:
    """What one attend takes: the shapes that travel, and its parameters."""

    q: ShapedArray
    """[batch, tokens, num_heads, head_dim]"""
    kv: ShapedArray
    """[batch, tokens, num_kv_heads, head_dim], of k and of v"""
    params: AttendParams


@dataclasses.dataclass(frozen=True, eq=False)
class SliceProgram:
    """The computation of one or more structurally equal slices, as a function of weights and context."""

    before_attended: tuple[JaxprEqn, ...]
    before_q: tuple[JaxprEqn, ...]
    before_kv: tuple[JaxprEqn, ...]
    rest: tuple[JaxprEqn, ...]
    weights: tuple[Var, ...]
    reads: tuple[Var, ...]
    attended: Var | None
    attends: tuple[Var, Var, Var] | None
    writes: tuple[Var, ...]

    def run(self, weights: Sequence[jax.Array], reads: Sequence[jax.Array], ports: "Ports") -> list[jax.Array]:
        """Runs the slice, handing q, then k and v on as soon as each can be had.

        Args:
            weights, reads: in the order of `Slice.weights` and `Slice.reads`.
            ports: how to reach the attention; `recv` is not called in the first slice, the sends not in the last.

        Returns:
            The values that the slice writes, in the order of `Slice.writes`.
        """
        env: dict[Var, Any] = dict(zip((*self.weights, *self.reads), (*weights, *reads), strict=True))
        _evaluate_all(self.before_attended, env)
        if self.attended is not None:
            self._fence(env, [v for e in self.before_attended for v in e.outvars], ports)
            env[self.attended] = ports.recv()
        _evaluate_all(self.before_q, env)
        if self.attends is not None:
            q, k, v = self.attends
            ports.send_q(read(env, q))
            self._fence(env, [u for e in self.before_kv for u in variables(e.invars)], ports)
            _evaluate_all(self.before_kv, env)
            ports.send_kv(read(env, k), read(env, v))
            self._fence(env, [u for e in self.rest for u in variables(e.invars)], ports)
        _evaluate_all(self.rest, env)
        return [env[v] for v in self.writes]

    def _fence(self, env: dict[Var, Any], candidates: Iterable[Var], ports: "Ports") -> None:
        """Keeps what uses these values behind the last message, and the next message behind these values."""
        fenced = [v for v in dict.fromkeys(candidates) if v in env and v not in self.weights]
        if fenced:
            env.update(zip(fenced, ports.fence([env[v] for v in fenced]), strict=True))


@dataclasses.dataclass(frozen=True)
class Ports:
    """How a slice reaches the attention, for whoever runs it. All are called while the slice is traced."""

    recv: Callable[[], jax.Array]
    """The output of the attend before the slice."""
    send_q: Callable[[jax.Array], None]
    send_kv: Callable[[jax.Array, jax.Array], None]
    fence: Callable[[list[jax.Array]], list[jax.Array]] = list
    """Returns the same values such that nothing computed from them can be moved before the messages so far, and no
    later message before they are there."""


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
    context: tuple[int, ...]
    """Values, inputs aside, that are there after this slice and wanted later, as context or as outputs."""
    context_bytes: int
    """Bytes of the values that the next slices read, inputs aside."""


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
    values: tuple[jax.ShapeDtypeStruct, ...]
    """Shapes of the values, by number."""


def cut(traced: Traced) -> Partition:
    """Cuts a traced model at each attend.

    Raises:
        ValueError: there is no attend (names the function's first line); two attends do not depend on one another, so
            that they cannot follow each other as layers do (names their source lines); or an output is a constant.
    """
    if any(isinstance(v, Literal) or v in traced.weight_vars for v in traced.outvars):
        raise ValueError("An output of the model does not depend on its inputs; it cannot be produced by a slice.")
    eqns = _needed(traced.eqns, traced.outvars)
    stages = _stages(eqns)
    attends = _attend_chain(eqns, stages, traced.source)
    weight_index = {v: i for i, v in enumerate(traced.weight_vars)}
    free = frozenset([*traced.weight_vars, *traced.input_vars])
    graph = _Graph(eqns, attends, stages, free, frozenset(variables(traced.outvars)))
    programs: dict[str, SliceProgram] = {}
    plans: list[tuple[int, SliceProgram]] = []
    carried: list[Var] = []
    for i in range(len(attends) + 1):
        program, carried = graph.slice_program(i, carried, weight_index)
        key = _structure(program)
        programs.setdefault(key, program)
        plans.append((list(programs).index(key), program))

    values = {v: i for i, v in enumerate(traced.input_vars)}
    for _, program in plans:
        for v in program.writes:
            values.setdefault(v, len(values))
    outputs = tuple(values[v] for v in variables(traced.outvars))
    return Partition(
        programs=tuple(programs.values()),
        slices=_slices(plans, weight_index, values, outputs, len(traced.input_vars)),
        sites=tuple(_site(e) for e in attends),
        num_inputs=len(traced.input_vars),
        outputs=outputs,
        values=tuple(shape_of(v) for v in values),
    )


def shape_of(variable: Var) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a variable's value."""
    aval: Any = variable.aval
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _evaluate_all(eqns: Iterable[JaxprEqn], env: dict[Var, Any]) -> None:
    for eqn in eqns:
        evaluate_eqn(eqn, env)


def _needed(eqns: Sequence[JaxprEqn], targets: Iterable[Var | Literal]) -> list[JaxprEqn]:
    """The equations that `targets` depend on, in their order."""
    wanted, kept = set(variables(targets)), []
    for eqn in reversed(eqns):
        if wanted.intersection(eqn.outvars):
            wanted.update(variables(eqn.invars))
            kept.append(eqn)
    return kept[::-1]


def _without(eqns: Sequence[JaxprEqn], others: Sequence[JaxprEqn]) -> list[JaxprEqn]:
    gone = set(map(id, others))
    return [e for e in eqns if id(e) not in gone]


def _stages(eqns: Sequence[JaxprEqn]) -> dict[Var, int]:
    """For every variable, how many attends in a row it depends on."""
    stages: dict[Var, int] = {}
    for eqn in eqns:
        stage = max((stages.get(v, 0) for v in variables(eqn.invars)), default=0)
        stage += eqn.primitive is attend_p
        stages.update((v, stage) for v in eqn.outvars)
    return stages


def _attend_chain(eqns: Sequence[JaxprEqn], stages: dict[Var, int], source: str) -> list[JaxprEqn]:
    attends = [e for e in eqns if e.primitive is attend_p]
    if not attends:
        raise ValueError(
            f"The model at {source} never calls lamina_jax.attention.attend in what its outputs depend on, so there is "
            "nowhere to cut it. Call attend once per layer, and use what it returns."
        )
    for i, eqn in enumerate(attends):
        if stages[eqn.outvars[0]] != i + 1:
            raise ValueError(
                f"Attends must follow one another, each depending on the one before; the one at {source_line(eqn)} "
                f"does not depend on the one at {source_line(attends[i - 1])}."
            )
    return attends


@dataclasses.dataclass(frozen=True, eq=False)
class _Graph:
    """The model between its attends."""

    eqns: list[JaxprEqn]
    attends: list[JaxprEqn]
    stages: Mapping[Var, int]
    free: frozenset[Var]
    """Weights, constants and inputs."""
    outputs: frozenset[Var]

    @functools.cached_property
    def makers(self) -> dict[Var, JaxprEqn]:
        return {v: e for e in self.eqns for v in e.outvars}

    @functools.cached_property
    def order(self) -> dict[int, int]:
        """Position of each equation, by its id."""
        return {id(e): i for i, e in enumerate(self.eqns)}

    def needed(self, targets: Iterable[Var], known: Collection[Var]) -> list[JaxprEqn]:
        """The equations that `targets` depend on, in their order, where the values `known` are there already."""
        found: dict[int, JaxprEqn] = {}
        stack = [v for v in targets if v not in known]
        while stack:
            eqn = self.makers[stack.pop()]
            if id(eqn) not in found:
                found[id(eqn)] = eqn
                stack.extend(v for v in variables(eqn.invars) if v not in known)
        return sorted(found.values(), key=lambda e: self.order[id(e)])

    @functools.cached_property
    def read_after(self) -> list[set[Var]]:
        """For each slice, the variables that do not depend on its attend but are read by something that does."""
        wanted: list[set[Var]] = [set() for _ in range(len(self.attends) + 1)]
        for eqn in self.eqns:
            # An attend reads its q, k and v in the slice before it.
            last = self.stages[eqn.outvars[0]] - (eqn.primitive is attend_p)
            for v in variables(eqn.invars):
                for i in range(self.stages.get(v, 0), last):
                    wanted[i].add(v)
        return wanted

    def slice_program(
        self, i: int, given: list[Var], weight_index: Mapping[Var, int]
    ) -> tuple[SliceProgram, list[Var]]:
        """Slice i, which is given the context `given`, and the context that it leaves."""
        attended = self.attends[i - 1].outvars[0] if i else None
        attend = self.attends[i] if i < len(self.attends) else None
        present = {*given, *([attended] if attended else [])}
        known = present | self.free
        targets = variables(attend.invars) if attend else []
        carried: list[Var] = []
        if attend is not None:
            carried = values_to_carry(
                makers=self.makers,
                wanted=self.read_after[i],
                present=present,
                free=self.free,
                computed=self.needed(targets, known),
            )
        done = {v for v in self.outputs if self.stages.get(v, 0) == i and v not in self.free}
        writes = [*carried, *done]
        before_q = self.needed(targets[:1], known)
        before_kv = _without(self.needed(targets, known), before_q)
        rest = _without(self.needed([*targets, *writes], known), [*before_q, *before_kv])
        groups = self._with_early_group(attended, before_q, before_kv, rest)
        made = dict.fromkeys(v for group in groups for e in group for v in e.outvars)
        read_vars = [v for group in groups for e in group for v in variables(e.invars)] + targets
        reads = [v for v in dict.fromkeys(read_vars) if v not in made and v is not attended]
        program = SliceProgram(
            *map(tuple, groups),
            weights=tuple(v for v in reads if v in weight_index),
            reads=tuple(v for v in reads if v not in weight_index),
            attended=attended,
            attends=(targets[0], targets[1], targets[2]) if attend else None,
            # In the order in which they are made, so that equal slices have equal lists.
            writes=tuple(v for v in (*made, attended) if v in set(writes)),
        )
        return program, carried

    @staticmethod
    def _with_early_group(attended: Var | None, *groups: list[JaxprEqn]) -> list[list[JaxprEqn]]:
        """The groups, and before them one of all equations that need not wait for `attended`."""
        if attended is None:
            return [[], *groups]
        tainted, late = {attended}, []
        for eqn in itertools.chain(*groups):
            if tainted.intersection(variables(eqn.invars)):
                tainted.update(eqn.outvars)
                late.append(eqn)
        early = _without(list(itertools.chain(*groups)), late)
        return [early, *(_without(group, early) for group in groups)]


def _slices(
    plans: Sequence[tuple[int, SliceProgram]],
    weight_index: Mapping[Var, int],
    values: Mapping[Var, int],
    outputs: tuple[int, ...],
    num_inputs: int,
) -> tuple[Slice, ...]:
    sizes = {values[v]: nbytes(v) for _, program in plans for v in program.writes}
    slices: list[Slice] = []
    alive, made = set(outputs), set(sizes)
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
                context=tuple(sorted(i for i in alive.intersection(made) if i >= num_inputs)),
                context_bytes=sum(sizes[i] for i in alive.difference(outputs) if i >= num_inputs),
            )
        )
        alive.update(reads)
        alive.difference_update(writes)
        made.difference_update(writes)
    return tuple(reversed(slices))


def _site(eqn: JaxprEqn) -> AttendSite:
    q, k, _ = eqn.invars
    return AttendSite(q=q.aval, kv=k.aval, params=AttendParams(**eqn.params))  # pyright: ignore[reportArgumentType]


def _structure(program: SliceProgram) -> str:
    """A digest that two programs share exactly if they differ in nothing but the names of variables."""
    names: dict[Var, int] = {}
    digest = hashlib.sha256()

    def note(*parts: Any) -> None:
        digest.update(repr(parts).encode())

    for group in (program.weights, program.reads, [program.attended] if program.attended else []):
        note("arguments", _named(group, names))
    for group in (program.before_attended, program.before_q, program.before_kv, program.rest):
        note("group", _frozen_eqns(group, names))
    note("attends", _named(program.attends or (), names), "writes", _named(program.writes, names))
    return digest.hexdigest()


def _named(atoms: Iterable[Var | Literal], names: dict[Var, int]) -> list[Any]:
    """Variables by the order in which they first appear, literals by value."""
    return [
        ("literal", str(a.aval), np.asarray(a.val).tobytes())
        if isinstance(a, Literal)
        else (names.setdefault(a, len(names)), str(a.aval))
        for a in atoms
    ]


def _frozen_eqns(eqns: Iterable[JaxprEqn], names: dict[Var, int]) -> list[Any]:
    return [(e.primitive.name, _frozen(e.params), _named(e.invars, names), _named(e.outvars, names)) for e in eqns]


def _frozen_jaxpr(jaxpr: Jaxpr) -> Any:
    # Not by its text, which shows neither the constants of what is nested in it nor all of an array.
    names: dict[Var, int] = {}
    heads = [_named(variables, names) for variables in (jaxpr.constvars, jaxpr.invars)]
    return heads, _frozen_eqns(jaxpr.eqns, names), _named(jaxpr.outvars, names)


def _frozen(param: Any) -> Any:
    """Something whose repr stands for an equation's parameter by value, arrays included."""
    match param:
        case ClosedJaxpr():
            return (_frozen_jaxpr(param.jaxpr), _frozen(param.consts))
        case dict():
            return [(key, _frozen(value)) for key, value in sorted(param.items())]
        case list() | tuple():
            return [_frozen(value) for value in param]
        case np.ndarray() | jax.Array():
            array = np.asarray(param)
            return (str(array.dtype), array.shape, array.tobytes())
        case _:
            return (type(param).__name__, str(param))
