"""Checks of whole runs: exact tokens over verbs and tcp, also with packets lost, and a cluster that is broken."""

import contextlib
import functools
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from lamina_jax.testing.rdma.deploy import (
    CLUSTER,
    MODEL,
    deploy,
    kill_attention_worker,
    log_of_model_worker,
    start_attention_worker,
)
from lamina_jax.testing.rdma.machines import LOOPBACK_DEVICE, ROOT, Job, Machine
from lamina_jax.testing.rdma.programs import run_here
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


def prepare_tokens(folder: Path) -> None:
    """Generates here what machines with this folder will generate, which also compiles their programs."""
    _expected(folder)


def tokens_on_one_machine(machine: Machine) -> Iterator[Row]:
    """One model worker and two attention workers joined by RDMA: the tokens of the unsplit model."""
    folder = machine.folder.parent
    expected = _expected(folder)
    job = machine.start(
        [sys.executable, "-c", _TOKENS, _model(folder), "verbs"],
        env={"LAMINA_RDMA_DEVICE": LOOPBACK_DEVICE},
        name="generate",
    )
    got = job.wait_for("^verbs: (.*)", _START_S)[1]
    yield judged("tokens over verbs, one machine", got == expected, f"{got}, expected {expected}")
    job.check(timeout_s=30)


def two_hosts(machines: tuple[Machine, ...]) -> Iterator[Row]:
    """The cluster of docs/deploy.md, set up as it says; before it is stopped, what breaks it. Nothing is left of it."""
    before = [_resources(machine) for machine in machines]
    yield from deploy(machines, before_stop=cluster_that_breaks)
    after = [_resources(machine) for machine in machines]
    yield judged("no queue or registered memory is left", after == before, f"{after}, before {before}")


def cluster_that_breaks(machines: tuple[Machine, ...]) -> Iterator[Row]:
    """RDMA between two machines: packets lost, a worker killed, the link down; the engine stays all the while."""
    a, b = machines
    expected = _expected(a.folder.parent)
    engine = _start_engine(a, CLUSTER)
    calls = _Calls(engine, expected)
    yield calls.next_are_exact("tokens over two machines", within_s=_START_S)
    chosen = re.findall(r"attention worker \d on \S+: (\w+), .*", log_of_model_worker(a))
    yield judged("transport between machines", {*chosen} == {"verbs"}, ", ".join(chosen))

    with _losing_packets(machines):
        yield calls.next_are_exact(f"tokens with {_LOSS_PERCENT:.0f} % of packets lost")

    kill_attention_worker(b, 0)
    yield calls.next_fails("attention worker 0 killed", r"attention worker 0 at \S+ on b")
    start_attention_worker(b, 0)
    yield calls.next_are_exact("tokens once it is back", within_s=_START_S, skip=0)

    a.set_link(up=False)
    yield calls.next_fails("link down", r"on b")
    a.set_link(up=True)
    yield calls.next_are_exact("tokens once the link is up", within_s=_START_S, skip=0)
    engine.kill()

    engine = _start_engine(a, _cluster_over_tcp(a))
    calls = _Calls(engine, expected)
    yield calls.next_are_exact("tokens over tcp, two machines", within_s=_START_S)
    with _losing_packets(machines):
        yield calls.next_are_exact(f"tokens over tcp with {_LOSS_PERCENT:.0f} % of packets lost")
    engine.kill()


@contextlib.contextmanager
def _losing_packets(machines: tuple[Machine, ...]) -> Iterator[None]:
    for machine in machines:
        machine.set_loss(_LOSS_PERCENT)
    yield
    for machine in machines:
        machine.set_loss(0)


class _Calls:
    """What the engine has said of its calls, and the next ones."""

    def __init__(self, engine: Job, expected: str):
        self._engine = engine
        self._expected = expected

    def next_are_exact(self, name: str, within_s: float = _CALL_S, *, skip: int = 1) -> Row:
        """Waits for a call that returns tokens and began after now, or with `skip` 0 is under way."""
        start = time.monotonic()
        got = self._after_the_next(r"tokens (.*)", within_s, skip)
        seconds = time.monotonic() - start
        return judged(name, got == self._expected, f"within {seconds:.1f} s" if got == self._expected else got)

    def next_fails(self, name: str, words: str) -> Row:
        """Waits for a call that ended with an error."""
        start = time.monotonic()
        got = self._after_the_next(r"error: (.*)", _CALL_S, 0)
        return judged(name, re.search(words, got) is not None, f"after {time.monotonic() - start:.1f} s: {got}")

    def _after_the_next(self, pattern: str, within_s: float, skip: int) -> str:
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


def _start_engine(machine: Machine, cluster: Path) -> Job:
    command = [sys.executable, "-m", "lamina_jax.testing.rdma.generate_forever", cluster, MODEL]
    return machine.start(command, name="engine")


def _cluster_over_tcp(machine: Machine) -> Path:
    """The same workers for an engine that asks for TCP."""
    path = Path("/root/tcp.py")
    changed = CLUSTER.read_text().replace('"auto"', '"tcp"')
    machine.run(["bash", "-ec", f"cat > {path} <<'END'\n{changed}\nEND"], timeout_s=20)
    return path


def _model(folder: Path) -> Path:
    model = folder / "tiny"
    if not model.exists():
        write_tiny_checkpoint(model, "gqa")
    return model


@functools.cache
def _expected(folder: Path) -> str:
    """The tokens of the unsplit model, computed outside of the machines."""
    command = [sys.executable, "-c", _TOKENS, _model(folder), "none", "shm"]
    output = run_here(command, folder=folder, cwd=ROOT, timeout_s=300.0)
    unsplit, split = (re.findall(rf"^{transport}: (.*)", output, re.MULTILINE) for transport in ("none", "shm"))
    if len(unsplit) != 1 or unsplit != split:
        raise RuntimeError(f"expected the same tokens of the unsplit model and the split one, got\n{output}")
    return unsplit[0]
