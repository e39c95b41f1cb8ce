"""Checks of whole runs: exact tokens over verbs and tcp, also with packets lost, and a cluster that is broken."""

import functools
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from lamina_jax.testing.rdma.machines import LOOPBACK_DEVICE, ROOT, Job, Machine
from lamina_jax.testing.rdma.report import Row, judged
from lamina_jax.testing.tiny import write_tiny_checkpoint

_START_S: Final = 300.0
_CALL_S: Final = 120.0
_LOSS_PERCENT: Final = 1.0

_TOKENS = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
from pathlib import Path
from lamina_jax import LLM
from lamina_jax.testing.rdma.generate_forever import SETTINGS, tokens_of
if __name__ == "__main__":
    for transport in sys.argv[2:]:
        workers = 0 if transport == "none" else 2
        options = {} if transport == "none" else {"transport": transport}
        with LLM(Path(sys.argv[1]), num_attention_workers=workers, **options, **SETTINGS) as llm:
            print(f"{transport}: {tokens_of(llm)}", flush=True)
"""


def tokens_on_one_machine(machine: Machine) -> Iterator[Row]:
    """One model worker and two attention workers joined by RDMA: the tokens of the unsplit model."""
    model = _model(machine)
    job = machine.start(
        [sys.executable, "-c", _TOKENS, model, "verbs"],
        env={"LAMINA_RDMA_DEVICE": LOOPBACK_DEVICE},
        name="generate",
    )
    expected = _expected(model)
    got = job.wait_for("^verbs: (.*)", _START_S)[1]
    yield judged("tokens over verbs, one machine", got == expected, f"{got}, expected {expected}")
    job.check(timeout_s=30)


def cluster_that_breaks(machines: tuple[Machine, ...]) -> Iterator[Row]:
    """Two machines, RDMA between them: packets lost, a worker killed, the link down; the engine stays all the while."""
    a, b = machines
    model = _model(a)
    expected = _expected(model)
    cluster = _cluster_file(machines, "auto")
    before = [_resources(machine) for machine in machines]
    workers = {i: _start_worker(b, cluster, i) for i in (0, 1)}
    model_worker = a.start(_script("launch_model_worker.py", cluster), name="model worker")
    engine = a.start([sys.executable, "-m", "lamina_jax.testing.rdma.generate_forever", cluster, model], name="engine")
    calls = _Calls(engine, expected)
    yield calls.next_are_exact("tokens over two machines", within_s=_START_S)
    chosen = re.findall(r"attention worker \d on \S+: (\w+), .*", model_worker.output)
    yield judged("transport between machines", chosen[:2] == ["verbs", "verbs"], ", ".join(chosen))

    for machine in machines:
        machine.set_loss(_LOSS_PERCENT)
    yield calls.next_are_exact(f"tokens with {_LOSS_PERCENT:.0f} % of packets lost")
    for machine in machines:
        machine.set_loss(0)

    workers[0].kill()
    yield calls.next_fails("attention worker 0 killed", r"attention worker 0 at \S+ on b")
    workers[0] = _start_worker(b, cluster, 0)
    yield calls.next_are_exact("tokens once it is back", within_s=_START_S)

    a.set_link(up=False)
    yield calls.next_fails("link down", r"on b")
    a.set_link(up=True)
    yield calls.next_are_exact("tokens once the link is up", within_s=_START_S)

    engine.kill()
    yield from _over_tcp(machines, model, expected)
    for job in (model_worker, *workers.values()):
        job.kill(15)
    ended = [job.wait(60) for job in (model_worker, *workers.values())]
    yield judged("workers end with status 0", ended == [0, 0, 0], f"{ended}")
    after = [_resources(machine) for machine in machines]
    yield judged("no queue or registered memory is left", after == before, f"{after}, before {before}")


def _over_tcp(machines: tuple[Machine, ...], model: Path, expected: str) -> Iterator[Row]:
    """Another engine, of the same workers, which asks for TCP."""
    a, _ = machines
    cluster = _cluster_file(machines, "tcp", make_key=False)
    engine = a.start([sys.executable, "-m", "lamina_jax.testing.rdma.generate_forever", cluster, model], name="engine")
    calls = _Calls(engine, expected)
    yield calls.next_are_exact("tokens over tcp, two machines", within_s=_START_S)
    for machine in machines:
        machine.set_loss(_LOSS_PERCENT)
    yield calls.next_are_exact(f"tokens over tcp with {_LOSS_PERCENT:.0f} % of packets lost")
    for machine in machines:
        machine.set_loss(0)
    engine.kill()


class _Calls:
    """What the engine has said of its calls, and the next ones."""

    def __init__(self, engine: Job, expected: str):
        self._engine = engine
        self._expected = expected

    def next_are_exact(self, name: str, within_s: float = _CALL_S) -> Row:
        """Waits for a call that began after now and returned tokens."""
        start = time.monotonic()
        got = self._after_the_next(r"tokens (.*)", within_s)
        seconds = time.monotonic() - start
        return judged(name, got == self._expected, f"within {seconds:.1f} s" if got == self._expected else got)

    def next_fails(self, name: str, words: str) -> Row:
        """Waits for a call that ended with an error."""
        start = time.monotonic()
        got = self._after_the_next(r"error: (.*)", _CALL_S, skip=0)
        return judged(name, re.search(words, got) is not None, f"after {time.monotonic() - start:.1f} s: {got}")

    def _after_the_next(self, pattern: str, within_s: float, skip: int = 1) -> str:
        """What a call later than the one under way has said; with `skip` 0 that one may say it."""
        done = len(re.findall(r"^call \d+:", self._engine.output, re.MULTILINE))
        deadline = time.monotonic() + within_s
        number = done + 1 + (skip if done else 0)
        while True:
            found = self._engine.wait_for(rf"^call {number}: ((?:tokens|error).*)", deadline - time.monotonic())
            if match := re.fullmatch(pattern, found[1]):
                return match[1]
            number += 1


def _resources(machine: Machine) -> str:
    """How many queues and memory regions the kernel holds for RDMA, of all processes together."""
    shown = machine.run(["rdma", "resource", "show"], timeout_s=20, name="resources")
    return ", ".join(f"{kind} {n}" for kind, n in re.findall(r"\b(pd|cq|qp|mr) (\d+)", shown))


def _start_worker(machine: Machine, cluster: Path, index: int) -> Job:
    command = [*_script("launch_attention_worker.py", cluster), f"--index={index}"]
    return machine.start(command, name=f"attention worker {index}")


def _script(name: str, cluster: Path) -> list[str]:
    return [sys.executable, f"scripts/{name}", f"--cluster={cluster}"]


def _cluster_file(machines: tuple[Machine, ...], transport: str, *, make_key: bool = True) -> Path:
    """A cluster like that of the document, with a key of its own that both machines have."""
    if make_key:
        _share_key(*machines)
    example = (ROOT / "configs/clusters/two_hosts.py").read_text()
    changed = example.replace('"auto"', f'"{transport}"').replace(
        "~/.config/lamina_jax/cluster.key", "/root/rdma-test.key"
    )
    path = Path(f"/root/{transport}.py")
    for machine in machines:
        machine.run(["bash", "-ec", f"cat > {path} <<'END'\n{changed}\nEND"], timeout_s=20)
    return path


def _share_key(a: Machine, b: Machine) -> None:
    make = [sys.executable, "scripts/make_cluster_key.py"]
    a.run(["rm", "-f", "/root/rdma-test.key"], timeout_s=20)
    a.run([*make, "--output=/root/rdma-test.key"], timeout_s=60, name="make key")
    key = a.run(["cat", "/root/rdma-test.key"], timeout_s=20).rstrip("\n")
    b.run(["bash", "-ec", f"umask 077; cat > /root/rdma-test.key <<'END'\n{key}\nEND"], timeout_s=20)


def _model(machine: Machine) -> Path:
    folder = machine.folder / "tiny"
    if not folder.exists():
        write_tiny_checkpoint(folder, "gqa")
    return folder


@functools.cache
def _expected(model: Path) -> str:
    """The tokens of the unsplit model, computed outside of the machines."""
    command = [sys.executable, "-c", _TOKENS, str(model), "none"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    found = re.search(r"^none: (.*)", run.stdout, re.MULTILINE)
    assert found is not None
    return found[1]
