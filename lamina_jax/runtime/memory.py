"""How much memory a process may still take."""

import contextlib
from pathlib import Path
from typing import Final

CACHE_SHARE_OF_MEMORY: Final = 0.25
"""Of a host's free memory, what the KV cache takes at most."""


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, or of its container (cgroup v2) if that is less."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        available = min(available, limit - used)
    return available
