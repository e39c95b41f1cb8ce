"""What happens when a worker dies, hangs, or the user has had enough: an error that says so, and nothing left."""

import contextlib
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
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie of an earlier test
            if "lamina_jax.runtime.attention_worker" in child.cmdline():
                found.append(child)
    return sorted(found, key=worker_index)


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
        message = rf"^attention worker {victim} \(pid {worker.pid}\) was killed by SIGKILL"
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
            WorkerError, match=r"recv of 'attended' \(step \d+, layer 0, batch 0\) from attention worker 0 .* died"
        ):
            llm.generate(PROMPT, PARAMS, use_tqdm=False)
        killer.wait()


@pytest.mark.parametrize("hung", [0, 1])
def test_worker_that_hangs_is_named_after_the_timeout(checkpoint, hung):
    with LLM(checkpoint, num_attention_workers=2, timeout_s=1.5) as llm:
        llm.generate(PROMPT, PARAMS, use_tqdm=False)
        worker = workers_of(os.getpid())[hung]
        worker.send_signal(signal.SIGSTOP)
        message = rf"^recv of 'attended' .* from attention worker {hung} .*no message came in 1.5 s"
        with pytest.raises(WorkerError, match=message):
            llm.generate(PROMPT, PARAMS, use_tqdm=False)


def test_worker_that_cannot_start_is_an_error(checkpoint, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(WorkerError, match=r"attention worker 0 .* ended with status 1"):
        LLM(checkpoint, num_attention_workers=1)


# Whoever started the tests in the background of a shell has them, and what they start, ignore Ctrl-C.
LISTENS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


def run_script(body: str, checkpoint: Path) -> subprocess.Popen:
    """Starts a user's script: no `if __name__ == "__main__"`, and prints a line when it has begun."""
    script = LISTENS + textwrap.dedent(body).replace("DIR", repr(str(checkpoint)))
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
    engine.send_signal(number)
    engine.communicate(timeout=10)
    assert_gone(workers)


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


def test_killed_worker_ends_a_script_cleanly(checkpoint):
    """One error that names the worker, last of all, and no noise of threads and programs that were under way."""
    engine = run_script(STREAMS_FOREVER, checkpoint)
    assert first_line(engine) == "begun\n"
    workers = workers_of(engine.pid)
    workers[0].send_signal(signal.SIGKILL)
    _, errors = engine.communicate(timeout=20)
    assert engine.returncode == 1
    assert errors.splitlines()[-1].startswith("lamina_jax.runtime.errors.WorkerError: attention worker 0")
    assert "Exception ignored" not in errors
    assert_gone(workers)


def test_ctrl_c_at_any_moment_leaves_an_llm_that_is_right(checkpoint):
    """The interrupt comes at moments spread over a call; afterwards the next call gives the right tokens."""
    prompts = [{"prompt_token_ids": list(range(1, n))} for n in (5, 9, 40)]
    with LLM(checkpoint, num_attention_workers=2) as llm:
        expected = [o.outputs for o in llm.generate(prompts, PARAMS, use_tqdm=False)]
        started = time.monotonic()
        llm.generate(prompts, PARAMS, use_tqdm=False)
        duration = time.monotonic() - started
        interrupted = 0
        for i in range(12):
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            signal.setitimer(signal.ITIMER_REAL, duration * (i + 0.5) / 13)
            try:
                llm.generate(prompts, PARAMS, use_tqdm=False)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert [o.outputs for o in llm.generate(prompts, PARAMS, use_tqdm=False)] == expected
    assert interrupted > 0


@pytest.mark.parametrize("moment", ["spawned", "said hello"])
def test_engine_killed_while_workers_start_leaves_nothing(checkpoint, tmp_path, moment):
    body = """
        import tempfile, time
        tempfile.tempdir = TEMP
        import lamina_jax.runtime.pool as pool

        wait = pool.AttentionWorkerPool._wait
        def slow(self, done, *rest):
            if MOMENT == "said hello":
                wait(self, done, *rest)
            print("begun", flush=True)
            time.sleep(60)
        pool.AttentionWorkerPool._wait = slow

        from lamina_jax import LLM
        LLM(model=DIR, num_attention_workers=2)
    """
    engine = run_script(body.replace("TEMP", repr(str(tmp_path))).replace("MOMENT", repr(moment)), checkpoint)
    assert first_line(engine) == "begun\n"
    workers = workers_of(engine.pid)
    assert len(workers) == 2
    engine.kill()
    engine.communicate(timeout=10)
    assert_gone(workers)
    assert list(tmp_path.iterdir()) == []


def test_forked_child_leaves_the_workers_alone(checkpoint):
    engine = run_script(
        """
        import os, sys, warnings
        from lamina_jax import LLM, SamplingParams
        warnings.simplefilter("ignore")  # about fork
        with LLM(model=DIR, num_attention_workers=1) as llm:
            child = os.fork()
            if child == 0:
                sys.exit(0)
            os.waitpid(child, 0)
            llm.generate({"prompt_token_ids": [5]}, SamplingParams(temperature=0.0), use_tqdm=False)
            print("done", flush=True)
        """,
        checkpoint,
    )
    line, errors = engine.communicate(timeout=30)
    assert line == "done\n", errors


def test_long_temporary_directory(checkpoint, tmp_path, monkeypatch):
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with LLM(checkpoint, num_attention_workers=1) as llm:
        assert len(llm.generate(PROMPT, PARAMS, use_tqdm=False)) == 1
