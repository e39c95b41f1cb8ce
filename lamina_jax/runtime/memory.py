"""How much memory a process may still take."""

import contextlib
from pathlib import Path


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, or of its container (cgroup v2) if that is less."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        available = min(available, limit - used)
    return available
