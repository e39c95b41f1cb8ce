"""What happens when a worker dies, hangs, or the user has had enough: an error that says so, and nothing left."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from lamina_jax import LLM, SamplingParams, WorkerError
from lamina_jax.testing import write_tiny_checkpoint

ROOT = Path(__file__).parents[2]
PARAMS = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
PROMPT = {"prompt_token_ids": [5, 6, 7]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gqa")
    write_tiny_checkpoint(directory, "gqa")
    return directory


def workers_of(pid: int) -> list[psutil.Process]:
    children = psutil.Process(pid).children(recursive=True)
    return sorted((p for p in children if "lamina_jax.runtime.attention_worker" in p.cmdline()), key=worker_index)


def worker_index(process: psutil.Process) -> str:
    return next(a for a in process.cmdline() if a.startswith("--index="))


def endless():
    while True:
        yield PROMPT, PARAMS


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_worker_is_named_within_5_seconds(checkpoint, victim):
    with LLM(checkpoint, num_attention_workers=2, max_num_seqs=4) as llm:
        outputs = llm.stream(endless())
        next(outputs)
        worker = workers_of(os.getpid())[victim]
        started = time.monotonic()
        worker.send_signal(signal.SIGKILL)
        message = rf"attention worker {victim} \(pid {worker.pid}\) was killed by SIGKILL"
        with pytest.raises(WorkerError, match=message):
            for _ in outputs:
                pass
        assert time.monotonic() - started < 5
        with pytest.raises(RuntimeError, match=rf"cannot be used any more: .*attention worker {victim}"):
            llm.generate(PROMPT, PARAMS, use_tqdm=False)
        assert not workers_of(os.getpid())


def test_killed_worker_error_names_the_layer_that_waited(checkpoint):
    with LLM(checkpoint, num_attention_workers=1) as llm:
        llm.generate(PROMPT, PARAMS, use_tqdm=False)
        # Stopped first, so that the step is under way, waiting, when the worker dies.
        (worker,) = workers_of(os.getpid())
        worker.send_signal(signal.SIGSTOP)
        killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {worker.pid}"])
        with pytest.raises(
            WorkerError, match=r"recv of 'attended' \(step \d+, layer 0\) from attention worker 0 .* died"
        ):
            llm.generate(PROMPT, PARAMS, use_tqdm=False)
        killer.wait()


def test_worker_that_hangs_is_named_after_the_timeout(checkpoint):
    with LLM(checkpoint, num_attention_workers=2, timeout_s=1.5) as llm:
        llm.generate(PROMPT, PARAMS, use_tqdm=False)
        worker = workers_of(os.getpid())[1]
        worker.send_signal(signal.SIGSTOP)
        with pytest.raises(WorkerError, match=r"from attention worker 1 .*no message came in 1.5 s"):
            llm.generate(PROMPT, PARAMS, use_tqdm=False)


def test_worker_that_cannot_start_is_an_error(checkpoint, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(WorkerError, match=r"attention worker 0 .* ended with status 1"):
        LLM(checkpoint, num_attention_workers=1)


def run_script(body: str, checkpoint: Path) -> subprocess.Popen:
    """Starts a user's script: no `if __name__ == "__main__"`, and prints a line when it has begun."""
    script = textwrap.dedent(body).replace("DIR", repr(str(checkpoint)))
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def first_line(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


STREAMS_FOREVER = """
    from lamina_jax import LLM, SamplingParams

    def endless():
        while True:
            yield {"prompt_token_ids": [5, 6, 7]}, SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True)

    with LLM(model=DIR, num_attention_workers=2) as llm:
        for index, output in llm.stream(endless()):
            if index == 0:
                print("begun", flush=True)
"""


def assert_gone(processes: list[psutil.Process], seconds: float = 5.0) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert not alive


def test_ctrl_c_ends_everything(checkpoint):
    engine = run_script(STREAMS_FOREVER, checkpoint)
    assert first_line(engine) == "begun\n"
    workers = workers_of(engine.pid)
    assert len(workers) == 2
    engine.send_signal(signal.SIGINT)
    _, errors = engine.communicate(timeout=10)
    assert engine.returncode == -signal.SIGINT
    assert errors.splitlines()[-1] == "KeyboardInterrupt"
    assert_gone(workers)


def test_ctrl_c_ends_everything_though_a_worker_hangs(checkpoint):
    engine = run_script(STREAMS_FOREVER, checkpoint)
    assert first_line(engine) == "begun\n"
    workers = workers_of(engine.pid)
    workers[0].send_signal(signal.SIGSTOP)
    engine.send_signal(signal.SIGINT)
    engine.communicate(timeout=20)
    assert engine.returncode == -signal.SIGINT
    assert_gone(workers)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_when_the_engine_is_killed(checkpoint, number):
    engine = run_script(STREAMS_FOREVER, checkpoint)
    assert first_line(engine) == "begun\n"
    workers = workers_of(engine.pid)
    control = Path(next(a for a in workers[0].cmdline() if a.startswith("--control=")).partition("ipc://")[2])
    assert control.parent.stat().st_mode & 0o777 == 0o700
    engine.send_signal(number)
    engine.communicate(timeout=10)
    assert_gone(workers)
    assert not control.parent.exists()


def test_forgotten_close_leaves_nothing(checkpoint):
    engine = run_script(
        """
        from lamina_jax import LLM, SamplingParams
        llm = LLM(model=DIR, num_attention_workers=2)
        (output,) = llm.generate({"prompt_token_ids": [5]}, SamplingParams(temperature=0.0))
        print(output.outputs[0].token_ids, flush=True)
        """,
        checkpoint,
    )
    line = first_line(engine)
    _, errors = engine.communicate(timeout=20)
    assert engine.returncode == 0, errors
    assert line.startswith("(")


def test_error_in_the_users_loop_leaves_the_llm_usable(checkpoint):
    with LLM(checkpoint, num_attention_workers=1) as llm:
        (expected,) = llm.generate(PROMPT, PARAMS, use_tqdm=False)
        outputs = llm.stream(endless())
        next(outputs)
        with pytest.raises(RuntimeError, match="under way"):
            llm.generate(PROMPT, PARAMS, use_tqdm=False)
        outputs.close()
        (again,) = llm.generate(PROMPT, PARAMS, use_tqdm=False)
        assert again.outputs == expected.outputs
