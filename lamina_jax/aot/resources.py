"""Registers and spills of kernels, as NVIDIA's assembler reports them."""

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>[^']+)' for '(?P<target>\w+)'\n"
    r"(?:.*\n)*?.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n"
    r"(?:.*\n)*?.*?Used (?P<registers>\d+) registers(?P<rest>.*)"
)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)")
_TARGET = re.compile(r"^\.target\s+(\w+)", re.MULTILINE)
_TIMEOUT_S = 300.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelResources:
    """What a kernel takes of a multiprocessor.

    Attributes:
        registers: of each thread, 255 at most.
        spill_bytes: stored to and loaded from memory because registers did not do, per thread.
        stack_bytes: of each thread, in memory.
        shared_bytes: static shared memory of a block.
    """

    name: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int


def parse_ptxas(output: str) -> list[KernelResources]:
    """Reads what ``ptxas -v`` prints, one entry for each kernel, in order."""
    found = []
    for match in _KERNEL.finditer(output):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        found.append(
            KernelResources(
                name=match["name"],
                registers=int(match["registers"]),
                spill_bytes=int(match["stores"]) + int(match["loads"]),
                stack_bytes=int(match["stack"]),
                shared_bytes=int(shared[1]) if shared else 0,
            )
        )
    return found


def assemble(ptxas: Path, sources: Iterable[str]) -> list[KernelResources]:
    """Assembles PTX and returns what its kernels take.

    Raises:
        RuntimeError: ptxas refuses a source, or does not report on each of its kernels.
    """
    found = []
    for source in sources:
        target = _TARGET.search(source)
        names = _ENTRY.findall(source)
        if target is None:
            raise RuntimeError(f"expected PTX, which names its target, got {source[:200]!r}")
        if not names:
            continue  # XLA puts constants into modules of their own
        kernels = parse_ptxas(_run(ptxas, target[1], source))
        if {kernel.name for kernel in kernels} != set(names):
            raise RuntimeError(f"expected ptxas to report on {names}, got {[kernel.name for kernel in kernels]}")
        found += kernels
    return found


def _run(ptxas: Path, target: str, source: str) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(source)
        file.flush()
        command = [str(ptxas), "-v", f"-arch={target}", file.name, "-o", "/dev/null"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    return result.stderr + result.stdout
