"""Engine, model worker and attention workers as processes of their own: same tokens, and whoever dies, it goes on."""

import contextlib
import fcntl
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cluster_process
import msgspec
import pytest
from cluster_process import SETTINGS, tokens

from lamina_jax import LLM, WorkerError
from lamina_jax.engine import backend
from lamina_jax.models import ModelConfig
from lamina_jax.runtime.assembly import model_facts
from lamina_jax.runtime.cluster import Cluster
from lamina_jax.testing import write_tiny_checkpoint

# More of them with LAMINA_KILL_SEEDS=20.
KILL_SEEDS = range(int(os.environ.get("LAMINA_KILL_SEEDS", "3")))
LONG_S = 120.0
WAITING = "waiting for "
COMPILED = "Finished XLA compilation"


class Process:
    """A process of the cluster, and the lines that it has written."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, cluster_process.__file__, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "2", **environment},
        )
        self.pid = self._popen.pid
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        with self._popen.stdout as lines:
            for line in lines:
                with self._changed:
                    self.lines.append(line.rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def expect(self, text: str, *, since: int = 0) -> str:
        """Waits for a line with that text, not before line `since`."""
        found = lambda: next((line for line in self.lines[since:] if text in line), None)  # noqa: E731
        with self._changed:
            assert self._changed.wait_for(lambda: found() or not self._thread.is_alive(), LONG_S), self.lines
        line = found()
        assert line is not None, self.lines
        return line

    def send_signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def end(self) -> int:
        """Waits for the end and returns the status."""
        status = self._popen.wait(LONG_S)
        self._thread.join(LONG_S)
        return status

    def kill(self) -> None:
        self._popen.kill()
        self.end()

    @property
    def channels(self) -> int:
        """Open ends of channels."""
        found = 0
        for descriptor in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found += os.readlink(descriptor).startswith("/dev/shm/")
        return found


class Workers:
    """The workers of a cluster."""

    def __init__(self) -> None:
        self.addresses = {role: f"tcp://127.0.0.1:{port}" for role, port in zip("m01", _free_ports(3), strict=True)}
        self.processes: dict[str, Process] = {}

    @property
    def cluster(self) -> Cluster:
        model, *attention = self.addresses.values()
        return Cluster(model_worker=model, attention_workers=tuple(attention))

    def start(self, *roles: str, **environment: str) -> None:
        for role in roles:
            name = "model" if role == "m" else role
            self.processes[role] = Process(name, self.addresses[role], **environment)

    def replace(self, role: str, **environment: str) -> None:
        """Ends a worker, if it still runs, and starts it anew."""
        self.processes[role].kill()
        self.start(role, **environment)
        self.processes[role].expect(WAITING)

    def engine(self, directory: Path, **environment: str) -> Process:
        model, *attention = self.addresses.values()
        return Process("engine", model, str(directory), *attention, **environment)

    def expect_idle(self) -> None:
        """Waits until no worker has a session, and checks that none has anything of one."""
        for process in self.processes.values():
            # The last line of a worker without a session.
            with process._changed:
                assert process._changed.wait_for(lambda p=process: p.lines and WAITING in p.lines[-1], LONG_S), (
                    process.lines
                )
            assert process.channels == 0

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()


def first_to_end(*processes: Process) -> int:
    """Waits for the end of the first of some processes; returns its status."""
    with contextlib.ExitStack() as stack:
        poller = select.poll()
        ends = {os.pidfd_open(process.pid): process for process in processes}
        for descriptor in ends:
            stack.callback(os.close, descriptor)
            poller.register(descriptor, select.POLLIN)
        ended = poller.poll(LONG_S * 1000)
        assert ended, [process.lines for process in processes]
        return ends[ended[0][0]].end()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gqa")
    write_tiny_checkpoint(directory, "gqa")
    return directory


@pytest.fixture(scope="module")
def expected(checkpoint):
    with LLM(checkpoint, num_attention_workers=0, **SETTINGS) as llm:
        return tokens(llm)


@pytest.fixture(scope="module")
def started():
    workers = Workers()
    try:
        yield workers
    finally:
        workers.close()


@pytest.fixture
def workers(started):
    """All workers, started and without a session; at the end, too."""
    missing = [role for role in started.addresses if role not in started.processes]
    started.start(*missing)
    for process in started.processes.values():
        process.expect(WAITING)
    yield started
    started.expect_idle()


def test_start_order_does_not_matter(started, checkpoint, expected):
    """First the engine, which waits for the model worker, which waits for an attention worker."""
    started.start("1")
    with ThreadPoolExecutor(1) as thread:
        opened = thread.submit(lambda: LLM(checkpoint, cluster=started.cluster, **SETTINGS))
        started.start("m")
        started.processes["m"].expect("session with an engine")
        started.start("0")
        with opened.result(LONG_S) as llm:
            assert tokens(llm) == expected
            # The same sessions serve again.
            assert tokens(llm) == expected


def test_more_batches_than_replicas_over_tcp(workers, checkpoint, expected):
    """Three batches on two replicas of the model, in the model worker's process."""
    model, *attention = workers.addresses.values()
    cluster = Cluster(model_worker=model, attention_workers=tuple(attention), transport="tcp")
    settings = {**SETTINGS, "num_batches": 3, "min_batch_seqs": 1}
    with LLM(checkpoint, cluster=cluster, **settings) as llm:
        assert tokens(llm) == expected
    workers.processes["m"].expect("attention worker 1 on ")


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("SIGKILL", r"the connection is lost\. \(recv of 'attended' .* from attention worker 1 .* failed: the peer"),
        ("SIGSTOP", "no sign of life for 5 s"),
        ("SIGTERM", "it was told to end"),
    ],
)
def test_attention_worker_lost_while_it_generates(workers, checkpoint, expected, how, why):
    workers.replace("1", KILL=f"16:0:{how}")
    victim = workers.processes["1"]
    name = rf"attention worker 1 at {workers.addresses['1']}, on .* \(pid {victim.pid}\): .*{why}"
    with LLM(checkpoint, cluster=workers.cluster, **SETTINGS) as llm:
        with pytest.raises(WorkerError, match=rf"^model worker at {workers.addresses['m']}, on .*: {name}"):
            tokens(llm)
        if how == "SIGTERM":
            assert victim.end() == 0
        victim.kill()
        workers.start("1")
        # The LLM is as good as new, and waits for the worker.
        assert tokens(llm) == expected


def test_engine_killed_while_it_generates(workers, checkpoint, expected):
    engine = workers.engine(checkpoint, KILL="20:0:SIGKILL")
    assert engine.end() == -signal.SIGKILL
    with LLM(checkpoint, cluster=workers.cluster, **SETTINGS) as llm:
        assert tokens(llm) == expected


@pytest.mark.parametrize("role", ["m", "0"])
def test_sigterm_ends_a_worker_that_tells_why(workers, checkpoint, expected, role):
    with LLM(checkpoint, cluster=workers.cluster, **SETTINGS) as llm:
        assert tokens(llm) == expected
        workers.processes[role].send_signal(signal.SIGTERM)
        assert workers.processes[role].end() == 0
        workers.start(role)
        assert tokens(llm) == expected


def test_session_like_the_one_before_compiles_nothing(workers, checkpoint, expected):
    for role in workers.addresses:
        workers.replace(role, JAX_LOG_COMPILES="1")
    counts = []
    for _ in range(2):
        with LLM(checkpoint, cluster=workers.cluster, **SETTINGS) as llm:
            assert tokens(llm) == expected
        workers.expect_idle()
        counts.append([sum(COMPILED in line for line in process.lines) for process in workers.processes.values()])
    assert all(counts[0])
    assert counts[1] == counts[0]


def test_sigterm_while_a_worker_waits(workers):
    workers.processes["1"].send_signal(signal.SIGTERM)
    assert workers.processes["1"].end() == 0
    workers.start("1")


def test_model_that_is_not_the_engines_is_refused(workers, checkpoint, monkeypatch):
    facts = msgspec.structs.replace(model_facts(ModelConfig.from_file(checkpoint / "config.json")), num_layers=7)
    monkeypatch.setattr(backend, "model_facts", lambda config: facts)
    with pytest.raises(WorkerError, match=r"there it has num_layers 7, on .* it has num_layers 2"):
        LLM(checkpoint, cluster=workers.cluster, **SETTINGS)


def test_model_that_the_workers_host_does_not_have(workers, checkpoint):
    descriptor = fcntl.fcntl(os.open(checkpoint, os.O_RDONLY), fcntl.F_DUPFD_CLOEXEC, 900)
    only_here = f"/proc/self/fd/{descriptor}"
    with pytest.raises(WorkerError, match=f"^model worker at .*CheckpointError: .*{only_here}/config.json"):
        LLM(only_here, cluster=workers.cluster, **SETTINGS)


def test_worker_that_never_comes_is_named(checkpoint):
    nobody = Cluster(model_worker="tcp://127.0.0.1:9", attention_workers=("tcp://127.0.0.1:10",))
    with pytest.raises(WorkerError, match=r"Waited 1 s for model worker at tcp://127\.0\.0\.1:9"):
        LLM(checkpoint, cluster=nobody, start_timeout_s=1.0, **SETTINGS)


def test_attention_worker_that_never_comes_is_named(workers, checkpoint):
    model, first, _ = workers.addresses.values()
    cluster = Cluster(model_worker=model, attention_workers=(first, "tcp://127.0.0.1:9"))
    with pytest.raises(WorkerError, match=r"Waited 1 s for attention worker 1 at tcp://127\.0\.0\.1:9"):
        LLM(checkpoint, cluster=cluster, start_timeout_s=1.0, **SETTINGS)


@pytest.mark.parametrize("setting", [{"num_attention_workers": 3}, {"transport": "tcp"}, {"trace_dir": "trace"}])
def test_settings_of_local_workers_are_refused(checkpoint, setting):
    nobody = Cluster(model_worker="tcp://127.0.0.1:9", attention_workers=("tcp://127.0.0.1:10",))
    with pytest.raises(ValueError, match=f"{next(iter(setting))} is for workers that the LLM starts"):
        LLM(checkpoint, cluster=nobody, **setting)


@pytest.mark.parametrize("seed", KILL_SEEDS)
def test_whoever_is_killed_whenever(workers, checkpoint, expected, seed):
    """While it connects, loads, prepares or runs steps: nothing hangs, nothing stays, and the next run is right."""
    rng = random.Random(seed)
    victim = rng.choice(["engine", "m", "0", "1"])
    kill = {"KILL": f"{rng.randrange(1, 40)}:{rng.random() * 5:.2f}:SIGKILL"}
    if victim != "engine":
        workers.replace(victim, **kill)
    engine = workers.engine(checkpoint, **(kill if victim == "engine" else {}))
    killed = engine if victim == "engine" else workers.processes[victim]
    # The victim may have too little to say to die of it.
    if first_to_end(killed, engine) == -signal.SIGKILL:
        if victim == "engine":
            engine = workers.engine(checkpoint)
        else:
            workers.start(victim)
    assert engine.end() == 0, engine.lines
    (line,) = [line for line in engine.lines if line.startswith("tokens ")]
    assert json.loads(line.removeprefix("tokens ")) == expected, (victim, kill)
