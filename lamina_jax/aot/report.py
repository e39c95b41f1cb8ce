"""What was compiled, as rows of a table and as reasons to fail."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lamina_jax.aot.compiler import Compiled, Memory
from lamina_jax.aot.fit import Fit
from lamina_jax.aot.hlo import Traffic, collectives, copies
from lamina_jax.aot.resources import KernelResources, assemble
from lamina_jax.aot.thunks import num_graphs, outside_graphs, parse_thunks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One program compiled for one target."""

    program: str
    target: str
    memory: Memory
    kernels: tuple[KernelResources, ...]
    collectives: dict[str, Traffic]
    copies: Traffic
    num_launches: int
    num_outside: int
    """Launches that no command buffer records."""
    num_graphs: int

    @classmethod
    def of(cls, program: str, target: str, compiled: Compiled, ptxas: Path) -> "Entry":
        """Reads off a compiled program what a table says of it, and assembles its kernels."""
        thunks = parse_thunks(compiled.thunks)
        return cls(
            program=program,
            target=target,
            memory=compiled.memory,
            kernels=tuple(assemble(ptxas, compiled.ptx)),
            collectives=collectives(compiled.hlo),
            copies=copies(compiled.hlo),
            num_launches=len(thunks),
            num_outside=len(outside_graphs(thunks)),
            num_graphs=num_graphs(compiled.thunks),
        )

    @property
    def spilled(self) -> list[KernelResources]:
        """Kernels that use memory for want of registers."""
        return [kernel for kernel in self.kernels if kernel.spill_bytes]


PROGRAM_HEADER = (
    "program",
    "target",
    "arguments",
    "results",
    "temporaries",
    "kernels",
    "registers",
    "spills",
    "collectives",
    "copies",
    "launches",
    "graphs",
)
FIT_HEADER = ("worker", "target", "held", "working", "in flight", "reserve", "memory", "free", "fits")


def program_row(entry: Entry) -> tuple[str, ...]:
    """A line of the table of programs."""
    memory = entry.memory
    sums = [f"{t.count} {kind} {human(t.nbytes)}" for kind, t in sorted(entry.collectives.items())]
    inside = entry.num_launches - entry.num_outside
    return (
        entry.program,
        entry.target,
        human(memory.arguments),
        human(memory.outputs),
        human(memory.temporaries),
        str(len(entry.kernels)),
        str(max((k.registers for k in entry.kernels), default=0)),
        human(sum(k.spill_bytes for k in entry.kernels)),
        ", ".join(sums) or "none",
        f"{entry.copies.count} {human(entry.copies.nbytes)}",
        str(entry.num_launches),
        f"{entry.num_graphs} with {inside} launches" if entry.num_graphs else "none",
    )


def fit_row(fit: Fit, target: str) -> tuple[str, ...]:
    """A line of the table of memory."""
    sizes = (fit.held, fit.working, fit.in_flight, fit.reserve, fit.capacity, fit.free)
    return (fit.worker, target, *map(human, sizes), "yes" if fit.fits else "NO")


def problems(entries: Sequence[Entry], fits: Sequence[tuple[str, Fit]]) -> list[str]:
    """Why the check fails: kernels that spill, workers that do not fit."""
    spills = [
        f"{entry.program} on {entry.target}: kernel {kernel.name} spills {kernel.spill_bytes} bytes per thread"
        for entry in entries
        for kernel in entry.spilled
    ]
    misfits = [
        f"{fit.worker} on {target}: needs {human(fit.needed)} of {human(fit.capacity)}, {human(-fit.free)} too much"
        for target, fit in fits
        if not fit.fits
    ]
    return spills + misfits


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    line = lambda cells: "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"  # noqa: E731
    return "\n".join([line(header), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)])


def human(nbytes: int) -> str:
    """Bytes in decimal units, as memory of GPUs is sold: 70.55 GB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if abs(nbytes) >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} B"
