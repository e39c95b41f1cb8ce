"""Programs that this machine compiles for virtual ones, whose processors are 20 times slower."""

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

_XLA_FLAGS: Final = (
    # What is compiled runs for a moment.
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    # What QEMU's processor has; this machine's may have more.
    " --xla_cpu_max_isa=AVX2"
)


def cache_settings(folder: Path) -> dict[str, str]:
    """Environment of processes, here and in machines, that share the programs which they compile.

    Args:
        folder: Shared by the machines.
    """
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": _XLA_FLAGS,
        "JAX_COMPILATION_CACHE_DIR": str(folder / "jax-cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # XLA warns of every program from another processor, even if that lacks no instruction that the program has.
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def share_programs() -> None:
    """From now on JAX takes this process's programs from its cache whichever processor they were compiled on."""
    from jax._src import cache_key

    cache_key._hash_accelerator_config = cache_key._hash_devices


def run_here(
    argv: Sequence[str | Path],
    *,
    folder: Path,
    cwd: Path,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    may_fail: bool = False,
) -> str:
    """Runs a program, here, as machines will run it, so that they find compiled what its Pythons compile.

    Args:
        argv: The program and its arguments.
        folder: Shared by the machines, which need not run yet.
        cwd: Where it starts.
        timeout_s: Seconds that it may take.
        env: Added to its environment.
        may_fail: Its status does not matter.

    Returns:
        What it wrote to stdout.

    Raises:
        RuntimeError: It failed; the message has the end of what it wrote.
        subprocess.TimeoutExpired: It took too long, and was killed.
    """
    with tempfile.TemporaryDirectory(prefix="lamina-programs-") as site:
        # Python imports this at its start, also in processes that the program starts.
        Path(site, "sitecustomize.py").write_text(f"from {__name__} import share_programs\n\nshare_programs()\n")
        env = {**os.environ, **cache_settings(folder), "PYTHONPATH": site, **(env or {})}
        run = subprocess.run(argv, env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout_s)
    if run.returncode != 0 and not may_fail:
        raise RuntimeError(f"{argv[0]} ended with status {run.returncode}\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return run.stdout
