"""The scripts with a real model and real workers."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lamina_jax import LLM, SamplingParams
from lamina_jax.runtime.cluster_key import make_key_file
from lamina_jax.testing import write_tiny_checkpoint

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gqa")
    write_tiny_checkpoint(directory, "gqa")
    return directory


@pytest.fixture(scope="module")
def expected(checkpoint):
    """Text by prompt, of the unsplit model."""
    params = SamplingParams(temperature=0.0, max_tokens=8)
    with LLM(checkpoint, num_attention_workers=0) as llm:
        outputs = llm.generate(["Hello", "abc", "x"], params, use_tqdm=False)
    return {o.prompt: o.outputs[0].text for o in outputs}


def run(script: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / script, *flags], capture_output=True, text=True, timeout=120, check=False
    )


def test_generate(checkpoint, expected, tmp_path):
    flags = [f"--model={checkpoint}", "--num_attention_workers=2", "--temperature=0", "--max_tokens=8"]
    done = run("generate.py", *flags, "--prompt=Hello", "--prompt=abc", f"--trace_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert f"Text: {expected['Hello']}" in done.stdout
    assert f"Text: {expected['abc']}" in done.stdout
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_batch_generate(checkpoint, expected, tmp_path):
    rows = [
        {"prompt": "Hello"},
        "not an object",
        {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "abc"}},
        {"prompt": "x" * 600},
        {"prompt": ""},
        {"prompt": "x", "max_tokens": -1},
        {"prompt": "x"},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [f"--model={checkpoint}", f"--input_file={source}", f"--output_file={target}", "--temperature=0"]
    done = run("batch_generate.py", *flags, "--max_tokens=8", "--num_attention_workers=2")
    assert done.returncode == 0, done.stderr
    hello, bad, openai, long, empty, negative, last = map(json.loads, target.read_text().splitlines())
    assert hello["outputs"][0]["text"] == expected["Hello"]
    assert openai["response"]["body"]["choices"][0]["text"] == expected["abc"]
    assert openai["custom_id"] == "a"
    assert last["outputs"][0]["text"] == expected["x"]
    for row, reason in ((bad, "object"), (long, "max_model_len"), (empty, "empty"), (negative, "at least 1, got -1")):
        assert reason in row["error"]["message"]
    assert "3 rows succeeded, 4 failed" in done.stderr


def test_user_errors_are_one_line(checkpoint):
    done = run("generate.py", f"--model={checkpoint}", "--prompt=x", "--num_attention_workers=9")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "generate.py: error: num_attention_workers is 9, but the model has only 3 KV heads to divide; "
        "use at most 3 attention workers."
    ]
    assert os.listdir("/dev/shm") == []


@contextlib.contextmanager
def started(script: str, *flags: str, log: Path):
    """A launch script's process; killed at the end if it still runs."""
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, ROOT / "scripts" / script, *flags], stderr=file, stdout=file)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_cluster_started_in_any_order(checkpoint, expected, tmp_path):
    with contextlib.ExitStack() as ports:
        sockets = [ports.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        model, *attention = (f"tcp://127.0.0.1:{s.getsockname()[1]}" for s in sockets)
    make_key_file(tmp_path / "key")
    fields = {"model_worker": model, "attention_workers": attention, "transport": "tcp", "key_file": "key"}
    (tmp_path / "c.py").write_text(
        f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({fields!r})\n"
    )
    cluster = f"--cluster={tmp_path}/c.py"
    generate = [cluster, f"--model={checkpoint}", "--temperature=0", "--max_tokens=8"]
    with contextlib.ExitStack() as workers:
        start = lambda script, *flags, log: workers.enter_context(  # noqa: E731
            started(script, cluster, *flags, log=tmp_path / log)
        )
        # The engine comes first, and waits; a worker that others wait for comes last.
        engine = start("generate.py", *generate, "--prompt=Hello", log="engine")
        running = [
            start("launch_attention_worker.py", "--index=1", log="attention 1"),
            start("launch_model_worker.py", log="model"),
            start("launch_attention_worker.py", "--index=0", log="attention 0"),
        ]
        assert engine.wait(timeout=240) == 0, (tmp_path / "engine").read_text()
        assert f"Text: {expected['Hello']}" in (tmp_path / "engine").read_text()

        again = run("generate.py", *generate, "--prompt=abc")
        assert again.returncode == 0, again.stderr
        assert f"Text: {expected['abc']}" in again.stdout

        for worker in running:
            worker.send_signal(signal.SIGTERM)
        assert [worker.wait(timeout=60) for worker in running] == [0, 0, 0]
    for name in ("model", "attention 0", "attention 1"):
        assert "opened 2, refused busy 0" in (tmp_path / name).read_text()
    assert "tcp, as" in (tmp_path / "model").read_text()
