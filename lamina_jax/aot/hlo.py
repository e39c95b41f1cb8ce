"""The order of computation and messages in a compiled program, read off its scheduled HLO and its thunks."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping

SEND = r'custom_call_target="lamina_(?:\w+_)?send"'
RECV = r'custom_call_target="lamina_(?:\w+_)?recv"'
FENCE = r'custom_call_target="lamina_(?:\w+_)?fence"'
TAG_Q, TAG_KV = (rf"{SEND}.*[{{ ]tag = {tag} : i32" for tag in (1, 2))
"""Sends of q, and of k and v: `transport.Tag` in the attributes of the call."""

_NAMES = re.compile(r"%([\w.-]+)")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True, eq=False)
class Hlo:
    """The entry computation of a compiled module, as XLA scheduled it."""

    names: tuple[str, ...]
    """Instructions, in the order in which they run."""
    text: Mapping[str, str]
    """What stands behind the equals sign of each."""
    computations: Mapping[str, str]
    """The other computations of the module by name: what the entry's fusions call."""

    @classmethod
    def parse(cls, module: str) -> "Hlo":
        """Reads ``jax.stages.Compiled.as_text()``.

        Raises:
            ValueError: the module is not scheduled, so its order says nothing.
        """
        if "is_scheduled=true" not in module.partition("\n")[0]:
            raise ValueError(f"expected a scheduled HLO module, got one that begins {module[:80]!r}")
        *others, entry = re.split(r"\n(?=ENTRY)", module, maxsplit=1)
        lines = _INSTRUCTION.findall(entry)
        computations = re.findall(r"^%([\w.-]+) \(.*?^\}", others[0], re.MULTILINE | re.DOTALL)
        bodies = re.findall(r"^%[\w.-]+ \(.*?^\}", others[0], re.MULTILINE | re.DOTALL)
        return cls(tuple(n for n, _ in lines), dict(lines), dict(zip(computations, bodies, strict=True)))

    @functools.cached_property
    def reads(self) -> Mapping[str, frozenset[str]]:
        """The instructions whose results each reads."""
        return {n: frozenset(_NAMES.findall(body)).intersection(self.text) for n, body in self.text.items()}

    def find(self, pattern: str) -> list[str]:
        """Instructions whose text, or the body of the fusion they call, matches, in order."""
        return [n for n in self.names if re.search(pattern, self.text[n])]

    def depends_on(self, name: str, other: str) -> bool:
        """Whether `name` reads `other`, at first or at second hand."""
        return other in self.ancestors(name)

    def ancestors(self, name: str) -> frozenset[str]:
        """All that an instruction depends on."""
        return self._ancestors[name]

    @functools.cached_property
    def _ancestors(self) -> dict[str, frozenset[str]]:
        found: dict[str, frozenset[str]] = {}
        # A schedule is a topological order, so whatever is read has been seen.
        for name in self.names:
            found[name] = self.reads[name].union(*(found[r] for r in self.reads[name]))
        return found

    def body(self, name: str) -> str:
        """The instruction's text, and that of the computation it calls."""
        called = re.search(r"calls=%([\w.-]+)", self.text[name])
        return self.text[name] + (self.computations.get(called[1], "") if called else "")

    def products(self, weight_shape: tuple[int, int]) -> list[str]:
        """Matrix products with a weight (a parameter) of this shape, by itself or joined to others."""
        return [n for n in self.names if self._is_product(n) and weight_shape in self._weight_shapes(n)]

    def _is_product(self, name: str) -> bool:
        return bool(re.search(r" dot\(|cublas|__triton_gemm|__onednn|__gemm", self.body(name)))

    def _weight_shapes(self, name: str) -> set[tuple[int, ...]]:
        """Shapes of the parameters that an operand is, or is only rearranged from."""
        shapes, stack = set(), list(self.reads[name])
        while stack:
            operand = stack.pop()
            text = self.text[operand]
            if " parameter(" in text:
                shapes.add(tuple(int(d) for d in text[text.index("[") + 1 : text.index("]")].split(",") if d))
            elif re.search(r" (?:bitcast|copy|transpose|concatenate)\(|wrapped_concatenate|wrapped_transpose", text):
                stack.extend(self.reads[operand])
        return shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Widths:
    """Shapes of a layer's weights on one device, by which its products are told apart."""

    q: tuple[int, int]
    kv: tuple[int, int]

    def __post_init__(self) -> None:
        if self.q == self.kv:
            raise ValueError(f"q and k have weights of one shape, {self.q}: their products cannot be told apart.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Instructions of one kind in a module.

    Attributes:
        count: how many there are; those of a loop's body count once.
        nbytes: size of their results.
    """

    count: int
    nbytes: int


_COLLECTIVE = r"all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}


def collectives(module: str) -> dict[str, Traffic]:
    """The communication among devices that a module has, by kind."""
    return _traffic(module, rf"({_COLLECTIVE})(?:-start)?")


def copies(module: str) -> Traffic:
    """The copies that a module makes as launches of their own."""
    return _traffic(module, r"(copy)(?:-start)?").get("copy", Traffic(count=0, nbytes=0))


def _traffic(module: str, opcode: str) -> dict[str, Traffic]:
    found: dict[str, Traffic] = {}
    for shape, kind in re.findall(rf"^\s+(?:ROOT )?%\S+ = (.*?) {opcode}\(", module, re.MULTILINE):
        # An asynchronous start has operands and results in a tuple; the last is the result.
        dtype, dims = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shape)[-1]
        nbytes = _ITEM_BYTES[dtype] * math.prod(int(d) for d in dims.split(",") if d)
        before = found.get(kind, Traffic(count=0, nbytes=0))
        found[kind] = Traffic(count=before.count + 1, nbytes=before.nbytes + nbytes)
    return found


def order_violations(hlo: Hlo, widths: Widths, *, receives: bool) -> list[str]:
    """How a slice with overlap departs from: what can run before the answer, recv, what q needs, send q, k and v,
    send kv. By data dependence, which no scheduler can undo, and in the schedule itself.

    Args:
        hlo: a slice that sends.
        widths: of the slice's weights.
        receives: whether it also receives, as all but the first slice do.

    Returns:
        A sentence for each violation.
    """
    q_sends, kv_sends, recvs = hlo.find(TAG_Q), hlo.find(TAG_KV), hlo.find(RECV)
    q_products, kv_products = hlo.products(widths.q), hlo.products(widths.kv)
    found = [
        f"expected {what} in the program, found none"
        for what, there in (
            ("a send of q", q_sends),
            ("a send of k and v", kv_sends),
            ("the product that makes q", q_products),
            ("the products that make k and v", kv_products),
            ("a recv", recvs or not receives),
        )
        if not there
    ]
    if recvs and not receives:
        found.append("expected no recv in the first slice, found one")
    chain = [*recvs, *q_sends, *kv_sends]
    found += _not_after(hlo, "message", itertools.pairwise(chain))
    found += _not_after(hlo, "product of q and send of q", itertools.product(q_products, q_sends))
    found += _not_after(hlo, "send of q and product of k, v", itertools.product(q_sends, kv_products))
    found += _not_after(hlo, "product of k, v and send of k, v", itertools.product(kv_products, kv_sends))
    return found


def early_violations(hlo: Hlo, patterns: Iterable[str]) -> list[str]:
    """Computation that matches, could run while the answer is awaited, and is not made to come before the recv."""
    recvs = hlo.find(RECV)
    early = [n for n in hlo.names for p in patterns if re.search(p, hlo.body(n))]
    missing = [] if early and recvs else [f"expected computation matching {list(patterns)} and a recv"]
    return missing + _not_after(hlo, "early computation and recv", itertools.product(early, recvs))


def _not_after(hlo: Hlo, what: str, pairs: Iterable[tuple[str, str]]) -> list[str]:
    place = {name: i for i, name in enumerate(hlo.names)}
    wrong = []
    for first, second in pairs:
        if not hlo.depends_on(second, first):
            wrong.append(f"{what}: {second} does not depend on {first}")
        if place[second] < place[first]:
            wrong.append(f"{what}: {second} is scheduled before {first}")
    return wrong
