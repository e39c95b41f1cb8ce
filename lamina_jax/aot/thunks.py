"""What a compiled program launches, in order, and what of it XLA put into command buffers (CUDA graphs)."""

import dataclasses
import re
from collections.abc import Sequence

_LINE = re.compile(r"^( *)(\d+): (k\w+) +\[([^\]]*)\] ?(.*)$")

_PART = re.compile(r"^ *(?:condition|body|branch[\w ]*):$")
"""What a loop or a branch launches stands below such a line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thunk:
    """One launch.

    Attributes:
        kind: XLA's word, e.g. "kCustomCall".
        label: the HLO instruction, or the kind again.
        in_graph: whether a command buffer records it.
    """

    kind: str
    label: str
    in_graph: bool


def parse_thunks(text: str) -> list[Thunk]:
    """Reads XLA's dump of the thunk sequence, as `Compiled.thunks` has it; the command buffers are left out.

    Raises:
        ValueError: a line is not of the format known.
    """
    thunks, graph_indent = [], None
    for line in text.splitlines():
        if not line.strip() or _PART.match(line):
            continue
        match = _LINE.match(line)
        if match is None:
            raise ValueError(f"expected a line like '001: kCopy [...] name' in the list of thunks, got {line!r}")
        indent, kind = len(match[1]), match[3]
        if graph_indent is not None and indent <= graph_indent:
            graph_indent = None
        if kind == "kCommandBuffer":
            graph_indent = indent
        else:
            thunks.append(Thunk(kind=kind, label=match[5].split(" ")[0], in_graph=graph_indent is not None))
    return thunks


def num_graphs(text: str) -> int:
    """How many command buffers the program launches."""
    return len(re.findall(r"^ *\d+: kCommandBuffer ", text, re.MULTILINE))


def outside_graphs(thunks: Sequence[Thunk]) -> list[Thunk]:
    """What is launched by itself."""
    return [t for t in thunks if not t.in_graph]
