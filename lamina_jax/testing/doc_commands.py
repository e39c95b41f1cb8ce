"""The commands of a document that name the host they run on, so that a test can run them as they are written."""

import dataclasses
import re
from pathlib import Path
from typing import Final

_BLOCK: Final = re.compile(r"^```(?P<label>[^`\n]*)\n(?P<script>.*?)^```$", re.MULTILINE | re.DOTALL)
_LABEL: Final = re.compile(r"bash host=(?P<hosts>[a-z]+(?:,[a-z]+)*)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Commands:
    """A fenced block of commands, for a shell of its own."""

    hosts: tuple[str, ...]
    """Where it runs, e.g. ("a", "b")."""
    script: str
    line: int
    """Of its first command in the document, from 1."""


def read_commands(document: Path) -> list[Commands]:
    """The blocks that begin with ```bash host=a, ```bash host=b or ```bash host=a,b, in the document's order.

    Raises:
        ValueError: a block of bash names no host, so that nobody would run it.
    """
    text = document.read_text()
    found = []
    for block in _BLOCK.finditer(text):
        line = text.count("\n", 0, block.start("script")) + 1
        label = _LABEL.fullmatch(block["label"])
        if label is not None:
            found.append(Commands(hosts=tuple(label["hosts"].split(",")), script=block["script"], line=line))
        elif block["label"].startswith("bash"):
            raise ValueError(f"{document}:{line - 1}: expected ```bash host=a, b or a,b; got ```{block['label']}")
    return found
