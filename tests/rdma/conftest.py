"""A machine that is none: the agent of the machines, as a process of this one."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from lamina_jax.testing.rdma import guest_agent
from lamina_jax.testing.rdma.machines import Machine

CALL = """
import os, socket, sys
line = socket.socket(socket.AF_UNIX)
line.connect(sys.argv[1])
os.dup2(line.fileno(), 0)
os.execv(sys.executable, [sys.executable, "-I", "-S", "-B", *sys.argv[2:]])
"""


class LocalMachine(Machine):
    """Has no network of its own, so leaves it as it is."""

    def _configure(self, script: str) -> None:
        del script

    def _warm_python(self, modules: Sequence[str]) -> None:
        del modules


@pytest.fixture
def make_machine(tmp_path: Path) -> Iterator[Callable[..., LocalMachine]]:
    """Makes a machine, by default one that takes jobs; its shared memory is `tmp_path / "NAME-shm"`."""
    made: list[LocalMachine] = []

    def make_machine(name: str = "a", command: list[str] | None = None, limit_s: float = 120.0) -> LocalMachine:
        control, folder, shm = (tmp_path / f"{name}-{what}" for what in ("control", "folder", "shm"))
        folder.mkdir()
        shm.mkdir()
        call = [sys.executable, "-I", "-c", CALL, str(control), guest_agent.__file__, str(shm)]
        machine = LocalMachine(
            name, command or call, control=control, address="127.0.0.1", folder=folder, limit_s=limit_s
        )
        made.append(machine)
        return machine

    yield make_machine
    for machine in made:
        machine.close()


@pytest.fixture
def machine(make_machine: Callable[..., LocalMachine]) -> LocalMachine:
    """A machine that is up."""
    machine = make_machine()
    machine.wait_until_ready()
    return machine
