"""Checks of whole runs: exact tokens over verbs and tcp, also with packets lost, and a cluster that is broken."""

import contextlib
import functools
import random
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from lamina_jax.testing.rdma import faults
from lamina_jax.testing.rdma.channel_checks import KILL_SEEDS
from lamina_jax.testing.rdma.deploy import (
    CLUSTER,
    MODEL,
    deploy,
    kill_worker,
    log_of_model_worker,
    prepare_deploy,
    start_worker,
    tiny_model,
)
from lamina_jax.testing.rdma.machines import DEVICE, LOOPBACK_DEVICE, ROOT, Job, Machine, at_once
from lamina_jax.testing.rdma.programs import run_here
from lamina_jax.testing.rdma.report import Row, judged

_START_S: Final = 300.0
_CALL_S: Final = 120.0
_BACK_S: Final = 20.0
"""About how long a worker takes in these machines from its start to its first step."""
_GIVEN_BACK_S: Final = 30.0
_LOSS_PERCENT: Final = 1.0
_FAULTS: Final = "/tmp/lamina-faults"
_FAULTY_PYTHON: Final = f"python -m {faults.__name__} {_FAULTS}"
"""Runs a worker's script, with the faults that are written there."""

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
        [sys.executable, "-c", _TOKENS, tiny_model(folder), "verbs"],
        env={"LAMINA_RDMA_DEVICE": LOOPBACK_DEVICE},
        name="generate",
    )
    got = job.wait_for("^verbs: (.*)", _START_S)[1]
    yield judged("tokens over verbs, one machine", got == expected, f"{got}, expected {expected}")
    job.check(timeout_s=30)


def prepare_two_hosts(folder: Path) -> None:
    """As `prepare_tokens`, also of what the document generates."""
    prepare_tokens(folder)
    prepare_deploy(folder)


def two_hosts(machines: tuple[Machine, ...]) -> Iterator[Row]:
    """The cluster of docs/deploy.md, set up as it says; before it is stopped, what breaks it. Nothing is left of it."""
    domains, resources = _resources(machines, "pd"), _resources(machines)
    yield from deploy(machines, before_stop=functools.partial(_cluster_that_breaks, resources))
    left, before = [_resources(machines, "pd"), _resources(machines)], [domains, resources]
    yield judged("no queue or registered memory is left", left == before, f"{left}, before {before}")


def _cluster_that_breaks(resources: Sequence[str], machines: tuple[Machine, ...]) -> Iterator[Row]:
    """RDMA between two machines: packets lost, workers killed, the link down; the engine stays all the while.

    Args:
        resources: What `_resources` says if no worker runs.
    """
    a, b = machines
    expected = _expected(a.folder.parent)
    engine = _start_engine(a, CLUSTER)
    calls = _Calls(engine, expected)
    yield calls.next_are_exact("tokens over two machines", within_s=_START_S)
    chosen = re.findall(r"attention worker \d on \S+: (\w+), .*", log_of_model_worker(a))
    yield judged("transport between machines", {*chosen} == {"verbs"}, ", ".join(chosen))

    with _losing_packets(machines):
        yield calls.next_are_exact(f"tokens with {_LOSS_PERCENT:.0f} % of packets lost")

    for seed in range(KILL_SEEDS):
        yield from _workers_killed(machines, calls, seed, resources)
    yield from _faults_of_a_worker(machines, calls)

    finished = calls.finished
    a.set_link(up=False)
    yield calls.fails("link down", rf"on b .*of {DEVICE} on a; its port is 1: DOWN", after=finished)
    a.set_link(up=True)
    yield calls.next_are_exact("tokens once the link is up", within_s=_START_S, skip=0)

    finished = calls.finished
    b.set_loss(100.0)
    yield calls.fails("nothing comes from machine b", rf"does not answer any more.* of {DEVICE} on a", after=finished)
    b.set_loss(0)
    yield calls.next_are_exact("tokens once it is heard again", within_s=_START_S, skip=0)
    engine.kill()
    yield _given_back(machines, "the engine", resources)

    engine = _start_engine(a, _cluster_over_tcp(a))
    calls = _Calls(engine, expected)
    yield calls.next_are_exact("tokens over tcp, two machines", within_s=_START_S)
    with _losing_packets(machines):
        yield calls.next_are_exact(f"tokens over tcp with {_LOSS_PERCENT:.0f} % of packets lost")
    engine.kill()


def _workers_killed(
    machines: tuple[Machine, ...], calls: "_Calls", seed: int, resources: Sequence[str]
) -> Iterator[Row]:
    """One is killed in the middle of a step, and another when that one has been started again: while this waits for it,
    opens a session or runs a step, at a moment of its own for each seed. The others give back what they held.
    """
    a, b = machines
    finished = calls.finished
    kill_worker(b, "attention worker 0")
    yield calls.fails("attention worker 0 killed", _is_lost("attention worker 0", b), after=finished)
    yield _given_back(machines, "attention worker 0", resources)

    victim, host = (("model worker", a), ("attention worker 1", b))[seed % 2]
    delay_s = random.Random(seed).uniform(0.0, _BACK_S)
    start_worker(b, "attention worker 0", python=_FAULTY_PYTHON)
    time.sleep(delay_s)
    finished = calls.finished
    kill_worker(host, victim)
    yield _given_back(machines, victim, resources)
    start_worker(host, victim)
    yield calls.next_are_exact("tokens once both are back", within_s=_START_S, skip=0)
    # None if it had no session yet: then it is waited for.
    errors = calls.errors(after=finished)
    named = all(re.search(_is_lost(victim, host), error) for error in errors)
    detail = "; ".join(errors) or "no call failed"
    yield judged(f"{victim} killed {delay_s:.1f} s after that", named, detail)


def _faults_of_a_worker(machines: tuple[Machine, ...], calls: "_Calls") -> Iterator[Row]:
    """What may fail in its RDMA does, in attention worker 0, which lives on: it runs in `faults.py`."""
    b = machines[1]
    on_b = rf"attention worker 0 at \S+, on b .*{DEVICE} on b"
    failed_pair = rf"queue pair has failed.* of {DEVICE} on b"
    finished = calls.finished
    _have_faults(b, "little memory", "queue pairs fail")
    yield calls.fails("queue pairs fail", failed_pair, after=finished)
    refused = rf"{on_b}, channel to model worker on a: the NIC cannot register \d+ bytes of memory: .*`ulimit -l`"
    yield calls.fails("memory is refused", refused, after=finished, but=failed_pair)
    _have_faults(b, "sound", "completion queues overrun")
    overrun = rf"the device reports: CQ error \({DEVICE} on b\)"
    yield calls.fails("completion queues overrun", overrun, after=calls.finished, but=refused)
    _have_faults(b, "sound")
    yield calls.next_are_exact("tokens once the worker is sound", within_s=_START_S, skip=0)


def _have_faults(machine: Machine, *faults: str) -> None:
    script = f"printf '%s\\n' {shlex.join(faults)} > {_FAULTS}"
    machine.run(["bash", "-ec", script], timeout_s=20.0, name="faults")


def _is_lost(worker: str, host: Machine) -> str:
    """A regular expression of what an error says if a worker itself has gone, and not one that it waited for."""
    return rf"{worker}(?: at \S+,)? on {host.name} \(pid [^)]*\)(?:: the connection is lost| failed: )"


def _given_back(machines: tuple[Machine, ...], killed: str, resources: Sequence[str]) -> Row:
    """Whether the kernels soon hold no queue and no registered memory of the session any more."""
    deadline = time.monotonic() + _GIVEN_BACK_S
    while (held := _resources(machines)) != resources and time.monotonic() < deadline:
        time.sleep(0.5)
    return judged(f"given back when {killed} was killed", held == resources, f"{held}, before {resources}")


@contextlib.contextmanager
def _losing_packets(machines: tuple[Machine, ...]) -> Iterator[None]:
    """Loses packets meanwhile. Raises RuntimeError if none was lost."""
    for machine in machines:
        machine.set_loss(_LOSS_PERCENT)
    yield
    lost = sum(at_once(Machine.lost_packets, machines))
    for machine in machines:
        machine.set_loss(0)
    if lost == 0:
        raise RuntimeError(f"expected {_LOSS_PERCENT} % of packets to be lost, got none")


class _Calls:
    """What the engine has said of its calls, and the next ones."""

    def __init__(self, engine: Job, expected: str):
        self._engine = engine
        self._expected = expected

    def next_are_exact(self, name: str, within_s: float = _CALL_S, *, skip: int = 1) -> Row:
        """Waits for a call that returns tokens and began after now, or with `skip` 0 is under way."""
        start = time.monotonic()
        got = self._await(r"tokens (.*)", within_s, self.finished + 1 + (skip if self.finished else 0))
        seconds = time.monotonic() - start
        return judged(name, got == self._expected, f"within {seconds:.1f} s" if got == self._expected else got)

    def fails(self, name: str, words: str, *, after: int, but: str | None = None) -> Row:
        """Waits for a call that ended with an error; not one of the first so many, nor with the words `but`."""
        start = time.monotonic()
        got = self._await(r"error: (.*)" if but is None else rf"error: (?!.*{but})(.*)", _CALL_S, after + 1)
        return judged(name, re.search(words, got) is not None, f"after {time.monotonic() - start:.1f} s: {got}")

    @property
    def finished(self) -> int:
        """How many have ended."""
        return len(re.findall(r"^call \d+:", self._engine.output, re.MULTILINE))

    def errors(self, *, after: int) -> list[str]:
        """What calls have ended with, but for the first so many."""
        said = re.findall(r"^call (\d+): error: (.*)", self._engine.output, re.MULTILINE)
        return [words for number, words in said if int(number) > after]

    def _await(self, pattern: str, within_s: float, number: int) -> str:
        """What call `number` or a later one has said."""
        deadline = time.monotonic() + within_s
        while True:
            found = self._engine.wait_for(rf"^call {number}: ((?:tokens|error).*)", deadline - time.monotonic())
            if match := re.fullmatch(pattern, found[1]):
                return match[1]
            number += 1


def _resources(machines: tuple[Machine, ...], kinds: str = "cq|qp|mr") -> list[str]:
    """How many queues and memory regions the kernel of each holds for RDMA, of all processes together.

    A process has a protection domain, "pd", as long as it lives.
    """
    return [
        ", ".join(f"{kind} {n}" for kind, n in re.findall(rf"\b({kinds}) (\d+)", shown))
        for shown in at_once(_shown_resources, machines)
    ]


def _shown_resources(machine: Machine) -> str:
    return machine.run(["rdma", "resource", "show"], timeout_s=20, name="resources")


def _start_engine(machine: Machine, cluster: Path) -> Job:
    command = [sys.executable, "-m", "lamina_jax.testing.rdma.generate_forever", cluster, MODEL]
    return machine.start(command, name="engine")


def _cluster_over_tcp(machine: Machine) -> Path:
    """The same workers for an engine that asks for TCP."""
    path = Path("/root/tcp.py")
    changed = CLUSTER.read_text().replace('"auto"', '"tcp"')
    machine.run(["bash", "-ec", f"cat > {path} <<'END'\n{changed}\nEND"], timeout_s=20)
    return path


@functools.cache
def _expected(folder: Path) -> str:
    """The tokens of the unsplit model, computed outside of the machines."""
    command = [sys.executable, "-c", _TOKENS, tiny_model(folder), "none", "shm"]
    output = run_here(command, folder=folder, cwd=ROOT, timeout_s=300.0)
    unsplit, split = (re.findall(rf"^{transport}: (.*)", output, re.MULTILINE) for transport in ("none", "shm"))
    if len(unsplit) != 1 or unsplit != split:
        raise RuntimeError(f"expected the same tokens of the unsplit model and the split one, got\n{output}")
    return unsplit[0]
