"""The rows of a report, and the table that they make."""

import dataclasses
from collections.abc import Sequence
from typing import Final, Literal

Outcome = Literal["passed", "FAILED"]

_DETAIL_WIDTH: Final = 110


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the report.

    Attributes:
        name: What was looked at.
        outcome: How it went.
        detail: Figures, or what is wrong; the table has its first line.
        seconds: How long it took; whoever runs the check fills it in.
    """

    name: str
    outcome: Outcome
    detail: str = ""
    seconds: float = 0.0


def passed(name: str, detail: str = "") -> Row:
    """All is well."""
    return Row(name=name, outcome="passed", detail=detail)


def failed(name: str, detail: str) -> Row:
    """Something is not."""
    return Row(name=name, outcome="FAILED", detail=detail)


def judged(name: str, ok: bool, detail: str) -> Row:
    """Passed if `ok`."""
    return passed(name, detail) if ok else failed(name, detail)


def table(rows: Sequence[Row]) -> str:
    """The rows in aligned columns, below a line that names these."""
    cells = [("check", "result", "seconds", "detail")]
    cells += [(row.name, row.outcome, f"{row.seconds:.1f}", _first_line(row.detail)) for row in rows]
    name, outcome, seconds, _ = (max(map(len, column)) for column in zip(*cells, strict=True))
    lines = [f"{a:<{name}}  {b:<{outcome}}  {c:>{seconds}}  {d}".rstrip() for a, b, c, d in cells]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def summary(rows: Sequence[Row], seconds: float) -> str:
    """One line: how many passed and failed, in what time."""
    num_failed = sum(row.outcome == "FAILED" for row in rows)
    return f"{len(rows) - num_failed} passed, {num_failed} failed in {seconds:.0f} s"


def _first_line(text: str) -> str:
    line = text.strip().partition("\n")[0]
    return line if len(line) <= _DETAIL_WIDTH else line[: _DETAIL_WIDTH - 3] + "..."
