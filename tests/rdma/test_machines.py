"""Jobs in machines: started, watched and killed, whatever they and the machine do."""

import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from lamina_jax.testing.rdma.machines import JobError, MachineError, machines

LIMIT_S = 60.0  # what nothing here takes
FOREVER = "import time; print('begun', flush=True); time.sleep(1000)"
CHILD_OF_ITS_OWN = """
import subprocess, sys, time
child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
print("child", child.pid, flush=True)
if sys.argv[1:] == ["stay"]:
    time.sleep(1000)
"""


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_output_status_and_environment_of_a_job(machine, tmp_path):
    script = "import os, sys; print(os.getcwd(), os.environ['WORD']); print('error', file=sys.stderr); sys.exit(3)"
    job = machine.start([sys.executable, "-c", script], env={"WORD": "said"}, cwd=tmp_path, name="a name / of mine")
    assert job.wait(LIMIT_S) == 3
    assert job.output.split() == [str(tmp_path), "said", "error"]
    assert job.log.parent == machine.folder
    with pytest.raises(JobError, match=r"(?s)a name / of mine on machine a ended with status 3\n.*said.*error"):
        job.check(LIMIT_S)


def test_what_a_job_writes_is_seen_while_it_runs(machine):
    job = machine.start([sys.executable, "-c", FOREVER])
    assert job.wait_for("^beg(.*)$", LIMIT_S)[1] == "un"
    assert job.status is None
    job.kill()
    assert job.wait(LIMIT_S) == -signal.SIGKILL


def test_jobs_run_at_the_same_time_and_one_after_another(machine):
    pipes = [machine.folder / f"pipe-{i}" for i in range(3)]
    machine.run(["mkfifo", *pipes], timeout_s=LIMIT_S)
    readers = [machine.start(["cat", pipe]) for pipe in pipes]
    for i, pipe in enumerate(pipes):
        machine.run(["bash", "-c", f"echo {i} > {pipe}"], timeout_s=LIMIT_S)
    assert [reader.check(LIMIT_S) for reader in readers] == ["0\n", "1\n", "2\n"]


def test_a_job_that_ends_at_once_is_not_missed(machine):
    assert [machine.start(["true"]).wait(LIMIT_S) for _ in range(50)] == [0] * 50


def test_a_job_that_never_ends_is_killed_when_its_time_is_up(machine):
    job = machine.start([sys.executable, "-c", FOREVER], name="endless")
    job.wait_for("begun", LIMIT_S)
    with pytest.raises(JobError, match=r"endless on machine a has not ended within 0 s\nbegun"):
        job.wait(timeout_s=0.1)
    assert job.status == -signal.SIGKILL


def test_words_that_never_come(machine):
    with pytest.raises(JobError, match=r"echo on machine a ended with status 0 without writing 'ready'\nhere I am"):
        machine.start(["echo", "here I am"]).wait_for("ready", LIMIT_S)
    with pytest.raises(JobError, match="has not written 'ready' within 0 s"):
        machine.start(["sleep", "1000"]).wait_for("ready", 0.1)


def test_a_signal_for_the_first_process_alone_or_for_its_group(machine):
    script = "sleep 1000 & echo child $!; wait"
    job = machine.start(["bash", "-c", script])
    child = int(job.wait_for(r"child (\d+)", LIMIT_S)[1])
    job.kill(group=False)
    assert job.wait(LIMIT_S) == -signal.SIGKILL
    assert is_alive(child)
    job.kill()
    assert machine.reset() in ([], ["sleep 1000"])
    assert not is_alive(child)


def test_jobs_wait_until_their_python_is_warm(machine, monkeypatch):
    is_warm = threading.Event()
    monkeypatch.setattr(machine, "_warm_python", lambda modules: is_warm.wait(LIMIT_S))
    machine.warm_python()
    with ThreadPoolExecutor(1) as pool:
        output = pool.submit(machine.run, ["echo", "hello"], timeout_s=LIMIT_S)
        assert machine.reset() == []
        assert not output.done()
        is_warm.set()
        assert output.result(LIMIT_S) == "hello\n"


def test_a_python_that_cannot_be_warmed_is_an_error_of_jobs(machine, monkeypatch):
    def fail(modules):
        raise JobError(f"no module {modules[0]}")

    monkeypatch.setattr(machine, "_warm_python", fail)
    machine.warm_python(["nothing"])
    for _ in range(2):
        with pytest.raises(JobError, match="no module nothing"):
            machine.start(["true"])
    assert machine.reset() == []


def test_no_such_program(machine):
    with pytest.raises(MachineError, match=r"machine a could not start no-such-program -x: .*No such file"):
        machine.start(["no-such-program", "-x"])
    assert machine.run(["echo", "still here"], timeout_s=LIMIT_S) == "still here\n"


def test_reset_finds_what_a_job_left_behind(machine, tmp_path):
    machine.run([sys.executable, "-c", CHILD_OF_ITS_OWN], timeout_s=LIMIT_S)
    (tmp_path / "a-shm/ring").touch()
    assert machine.reset() == ["sleep 1000", str(tmp_path / "a-shm/ring")]
    assert machine.reset() == []


def test_reset_kills_a_job_that_still_runs_without_a_word(machine):
    job = machine.start([sys.executable, "-c", FOREVER])
    assert machine.reset() == []
    assert job.status == -signal.SIGKILL


def test_closing_ends_all_that_ran(machine):
    job = machine.start([sys.executable, "-c", CHILD_OF_ITS_OWN, "stay"])
    child = int(job.wait_for(r"child (\d+)", LIMIT_S)[1])
    assert job.pid is not None
    machine.close()
    assert not machine.alive
    assert not is_alive(job.pid)
    assert not is_alive(child)


def test_a_machine_whose_time_is_up(make_machine):
    machine = make_machine(limit_s=3.0)
    machine.wait_until_ready()
    job = machine.start(["sleep", "1000"])
    with pytest.raises(MachineError, match="machine a was killed when its 3 s were up, while waiting for sleep"):
        job.wait(LIMIT_S)
    assert not machine.alive
    # The agent ends its jobs on its own; in a real machine nothing is left to end.
    assert job.pid is not None
    os.kill(job.pid, signal.SIGKILL)


def test_power_cut(machine):
    job = machine.start(["sleep", "1000"])
    machine.cut_power()
    with pytest.raises(MachineError, match="machine a ended while waiting for sleep"):
        job.wait(LIMIT_S)
    with pytest.raises(MachineError, match="machine a ended"):
        machine.start(["true"])
    assert job.pid is not None
    os.kill(job.pid, signal.SIGKILL)


def test_a_machine_that_does_not_boot_says_why(make_machine):
    machine = make_machine(command=["bash", "-c", "echo no such disk; exit 1"])
    start = time.monotonic()
    with pytest.raises(MachineError, match=r"machine a ended while booting\nno such disk"):
        machine.wait_until_ready()
    assert time.monotonic() - start < LIMIT_S


def test_no_more_than_two(tmp_path):
    with pytest.raises(ValueError, match="expected 1 or 2 machines, got 3"), machines(3, folder=tmp_path):
        pass
