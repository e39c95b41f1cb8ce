"""docs/deploy.md as somebody would follow it: its commands, run as they are written, in two machines."""

import functools
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from lamina_jax.testing.doc_commands import Commands, read_commands
from lamina_jax.testing.rdma.machines import ROOT, JobError, Machine
from lamina_jax.testing.rdma.programs import run_here
from lamina_jax.testing.rdma.report import Row, judged, passed
from lamina_jax.testing.tiny import write_tiny_checkpoint

DOCUMENT: Final = ROOT / "docs" / "deploy.md"

_BLOCK_LIMIT_S: Final = 240.0
CLUSTER: Final = ROOT / "configs" / "clusters" / "two_hosts.py"
"""The cluster of the document."""
MODEL: Final = "checkpoints/tiny"
"""The model of the document, as jobs of host a find it."""
_CLUSTER_FLAG: Final = f"--cluster={CLUSTER.relative_to(ROOT)}"
WORKERS: Final = ("attention worker 0", "attention worker 1", "model worker")
_STOPS: Final = "kill -TERM"


def deploy(machines: tuple[Machine, ...], before_stop: Callable[[tuple[Machine, ...]], Iterator[Row]]) -> Iterator[Row]:
    """Every block of commands on its hosts, in order; what is generated is what one host generates.

    Args:
        machines: Hosts a and b.
        before_stop: What else to find out while the workers run.
    """
    by_name = {machine.name: machine for machine in machines}
    _let_log_in(*machines)
    folder = machines[0].folder.parent
    model = tiny_model(folder)
    machines[0].run(["bash", "-ec", f"mkdir -p checkpoints; rm -rf {MODEL}; cp -r {model} {MODEL}"], timeout_s=30.0)
    ended = ""
    for block in read_commands(DOCUMENT):
        if _STOPS in block.script and not ended:
            yield from before_stop(machines)
        name = f"deploy.md line {block.line}"
        jobs = [by_name[host].start(_bash(block.script), name=name) for host in block.hosts]
        try:
            outputs = [job.check(_BLOCK_LIMIT_S) for job in jobs]
        except JobError as error:
            raise JobError(f"{error}\n{_logs(machines)}") from error
        yield passed(f"{name} on {' and '.join(block.hosts)}")
        if _generates(block):
            got, expected = _texts(outputs[0]), _on_one_host(block.script, folder)
            yield judged("deploy.md: its tokens", got == expected, f"{got}, expected {expected}")
        if _STOPS in block.script:
            ended += "".join(outputs)
    names = re.findall(r"(\w+ worker(?: \d)?): ended; came to", ended)
    yield judged("workers end when told", sorted(names) == list(WORKERS), ", ".join(names))


def prepare_deploy(folder: Path) -> None:
    """Generates here what the document's commands will generate in machines with this folder."""
    for block in filter(_generates, read_commands(DOCUMENT)):
        _on_one_host(block.script, folder)


def tiny_model(folder: Path) -> Path:
    """A model that machines with this folder can load."""
    model = folder / "tiny"
    if not model.exists():
        write_tiny_checkpoint(model, "gqa")
    return model


def start_worker(machine: Machine, worker: str, python: str = "python") -> None:
    """Starts one of `WORKERS` as the document does, in the place of one that has ended.

    Args:
        machine: Its host.
        worker: Which one.
        python: Bash that runs its script.
    """
    kind, _, index = worker.partition(" worker")
    name = worker.replace(" ", "_")
    arguments = _CLUSTER_FLAG + (f" --index={index.strip()}" if index else "")
    command = f"{python} scripts/launch_{kind}_worker.py {arguments}"
    machine.run(_bash(f"nohup {command} > {name}.log 2>&1 & echo $! > {name}.pid"), timeout_s=30.0)


def kill_worker(machine: Machine, worker: str) -> None:
    """Kills one of `WORKERS` that was started as in the document."""
    machine.run(_bash(f"kill -KILL $(cat {worker.replace(' ', '_')}.pid)"), timeout_s=30.0)


def log_of_model_worker(machine: Machine) -> str:
    """What it has written."""
    return machine.run(["cat", "model_worker.log"], timeout_s=30.0)


def _logs(machines: Iterable[Machine]) -> str:
    """What the workers have written."""
    return "\n".join(m.run(["bash", "-c", "tail -n 20 *_worker*.log"], timeout_s=60.0, name="logs") for m in machines)


def _bash(script: str) -> list[str]:
    return ["bash", "-euo", "pipefail", "-c", script]


def _generates(block: Commands) -> bool:
    return _CLUSTER_FLAG in block.script and MODEL in block.script


@functools.cache
def _on_one_host(script: str, folder: Path) -> list[str]:
    """What the commands generate if there is neither cluster nor attention worker."""
    model = shlex.quote(str(tiny_model(folder)))
    script = script.replace(_CLUSTER_FLAG, "--num_attention_workers=0").replace(MODEL, model)
    path = f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH\n"
    return _texts(run_here(_bash(path + script), folder=folder, cwd=ROOT, timeout_s=300.0))


def _texts(output: str) -> list[str]:
    return re.findall(r"^(?:Prompt|Text): .*$", output, re.MULTILINE)


def _let_log_in(a: Machine, b: Machine) -> None:
    """Has root of host a log in to b by ssh, as whoever looks after both hosts can."""
    make_key = """
        rm -rf ~/.ssh
        mkdir -m 700 ~/.ssh
        ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519
        echo 'StrictHostKeyChecking accept-new' > ~/.ssh/config
        cat ~/.ssh/id_ed25519.pub
    """
    key = a.run(["bash", "-ec", make_key], timeout_s=60.0, name="ssh-keygen")
    allow = f"""
        rm -rf ~/.ssh
        mkdir -m 700 ~/.ssh
        echo {shlex.quote(key)} > ~/.ssh/authorized_keys
        mkdir -p /etc/dropbear
        # Bash reads it for a command of ssh, too; what it does on this host may take seconds.
        rm -f ~/.bashrc
        exec dropbear -F -R -E
    """
    b.start(["bash", "-ec", allow], name="sshd")
    b.wait_for_port(22)
