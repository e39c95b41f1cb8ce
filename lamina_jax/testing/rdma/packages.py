"""The Debian packages that the machines and pyverbs need."""

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

MACHINE_PACKAGES: Final = (
    "qemu-system-x86",
    "busybox-static",
    "kmod",
    "iproute2",
    "ibverbs-providers",
    "ibverbs-utils",
    "perftest",
    "libibverbs-dev",
    "openssh-client",
    "dropbear-bin",
)
"""QEMU, what makes an initramfs, and the programs that run in the machines."""
PYVERBS_PACKAGES: Final = ("libibverbs-dev", "libnl-3-dev", "libnl-route-3-dev", "pkg-config")
"""What rdma-core and the custom calls of verbs channels are compiled with, besides a C compiler."""

_INSTALL: Final = ("apt-get", "install", "--yes", "--no-install-recommends")


class SetupError(RuntimeError):
    """This machine lacks something. The message says what, and what to do."""


def require_packages(names: Sequence[str]) -> None:
    """Installs those that are missing.

    Raises:
        SetupError: Some are missing, and this is not root on a Debian, or apt-get failed.
    """
    missing = [name for name in names if not _installed(name)]
    if not missing:
        return
    needed = f"the Debian packages {', '.join(missing)} are needed"
    if shutil.which("apt-get") is None:
        raise SetupError(f"{needed}, and this machine has no apt-get to install them with; run this on Debian 12")
    command = [*_INSTALL, *missing]
    if os.geteuid() != 0:
        raise SetupError(f"{needed}; run as root: apt-get update && {' '.join(command)}")
    run_tool(["apt-get", "--quiet", "update"])
    run_tool(command, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})


def run_tool(
    command: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    stdin: bytes | None = None,
) -> bytes:
    """Runs a program of the set-up and returns what it wrote to stdout.

    Raises:
        SetupError: It is missing, failed, or took more than 20 minutes. The message has the end of its output.
    """
    words = " ".join(map(str, command))
    try:
        ended = subprocess.run(command, cwd=cwd, env=env, input=stdin, capture_output=True, timeout=1200)
    except FileNotFoundError as error:
        raise SetupError(f"{command[0]} is needed, for: {words}; it is not on the PATH") from error
    except subprocess.TimeoutExpired as error:
        raise SetupError(f"not done after 20 minutes: {words}") from error
    if ended.returncode != 0:
        said = (ended.stdout + ended.stderr).decode(errors="replace").rstrip().splitlines()[-15:]
        raise SetupError("\n".join([f"status {ended.returncode} of: {words}", *said]))
    return ended.stdout


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from setting up the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _installed(name: str) -> bool:
    if shutil.which("dpkg-query") is None:
        return False
    asked = subprocess.run(["dpkg-query", "-W", "-f", "${db:Status-Abbrev}", name], capture_output=True, text=True)
    return asked.stdout.startswith("ii")
