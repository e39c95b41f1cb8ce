"""The launch scripts as a user runs them."""

import os
import signal
import socket
import subprocess

import pytest
from launching import CLUSTER_FILE, ROOT, cluster_file, command

from lamina_jax.runtime.cluster_key import make_key_file

LOOPBACK = str(ROOT / "configs" / "clusters" / "loopback.py")


def run(script, *flags, environment=()) -> subprocess.CompletedProcess:
    env = {**os.environ, **dict(environment)}
    return subprocess.run(command(script, *flags), capture_output=True, text=True, timeout=120, env=env)


@pytest.mark.parametrize("script", ["launch_model_worker.py", "launch_attention_worker.py"])
def test_help_shows_the_usage_and_every_flag(script):
    done = run(script, "--help")
    assert done.returncode == 0
    assert f"python scripts/{script} --cluster=FILE" in done.stdout
    for flag in ("--cluster:", "--[no]check:", "--platform:", "--rdma_device:"):
        assert f"  {flag}" in done.stdout
    assert ("  --index:" in done.stdout) == ("attention" in script)


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("launch_model_worker.py", [], "--cluster is required; see --help"),
        ("launch_model_worker.py", ["--cluster=none.py"], "no cluster file at none.py; see configs/clusters/ for"),
        ("launch_model_worker.py", [f"--cluster={LOOPBACK}", "x"], "unexpected argument 'x'; see --help"),
        ("launch_model_worker.py", ["--index=0"], "Unknown command line flag 'index'"),
        ("launch_attention_worker.py", [f"--cluster={LOOPBACK}"], "--index is required; see --help"),
        (
            "launch_attention_worker.py",
            [f"--cluster={LOOPBACK}", "--index=2"],
            f"--index is 2, and {LOOPBACK} has 2 attention workers, from 0",
        ),
        ("launch_attention_worker.py", ["--index=-1"], "flag --index=-1: -1 is not a non-negative integer"),
    ],
)
def test_mistakes_are_reported_in_one_line(script, flags, message):
    done = run(script, *flags)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{script}: error: {message}")


def test_a_file_that_is_no_cluster_is_reported_in_one_line(tmp_path):
    (tmp_path / "c.py").write_text(CLUSTER_FILE.format(fields={"model_workers": "tcp://127.0.0.1:1"}))
    done = run("launch_model_worker.py", f"--cluster={tmp_path}/c.py")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"launch_model_worker.py: error: {tmp_path}/c.py: unknown field model_workers; there are")


def test_a_key_or_an_address_that_cannot_be_used_is_reported_in_one_line(tmp_path):
    model, _ = cluster_file(tmp_path / "c.py", key_file=str(tmp_path / "key"))
    done = run("launch_model_worker.py", f"--cluster={tmp_path}/c.py")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"launch_model_worker.py: error: there is no cluster key at {tmp_path}/key; copy that of another host, or make "
        "one with scripts/make_cluster_key.py"
    ]
    make_key_file(tmp_path / "key")
    with socket.create_server(("127.0.0.1", int(model.rpartition(":")[2]))):
        done = run("launch_model_worker.py", f"--cluster={tmp_path}/c.py")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("launch_model_worker.py: error: ")
    assert f"model worker cannot listen on {model}: Address already in use" in line


def rows(table):
    """Result and detail of each check by name."""
    heading, *lines, summary = table.splitlines()
    starts = [heading.index(word) for word in ("check", "result", "detail")]
    cells = [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in lines]
    return {name: (result, detail) for name, result, detail in cells}, summary


def test_check_of_a_worker(tmp_path):
    _, attention = cluster_file(tmp_path / "c.py", key_file="key")
    flags = ["launch_attention_worker.py", f"--cluster={tmp_path}/c.py", "--index=0", "--check"]
    done = run(*flags)
    table, summary = rows(done.stdout)
    assert (done.returncode, done.stderr, summary) == (1, "", "5 checks, 1 failed")
    assert table["key file"] == (
        "FAILED",
        f"there is no cluster key at {tmp_path}/key; copy that of another host, or make one with "
        "scripts/make_cluster_key.py",
    )
    assert table["own address"] == ("ok", f"{attention} is this host's, and the port is free")
    make_key_file(tmp_path / "key")
    done = run(*flags)
    table, summary = rows(done.stdout)
    assert (done.returncode, summary) == (0, "5 checks, 0 failed")
    assert {result for result, _ in table.values()} == {"ok"}


def test_check_of_a_host_without_rdma(tmp_path):
    flags = [f"--cluster={tmp_path}/c.py", "--check", "--rdma_device=none_of_that_name"]
    cluster_file(tmp_path / "c.py", transport="verbs")
    done = run("launch_attention_worker.py", "--index=0", *flags)
    table, _ = rows(done.stdout)
    assert done.returncode == 1
    assert table["RDMA device"][0] == "FAILED"
    assert "none_of_that_name" in table["RDMA device"][1]


def test_check_of_an_engine_needs_the_model_worker(tmp_path):
    model, _ = cluster_file(tmp_path / "c.py")
    done = run("generate.py", f"--cluster={tmp_path}/c.py", "--check")
    table, summary = rows(done.stdout)
    assert (done.returncode, done.stderr, summary) == (1, "", "3 checks, 1 failed")
    assert table["model worker"][0] == "FAILED"
    assert f"Waited 3 s for model worker at {model}: no answer yet." in table["model worker"][1]
    done = run("generate.py", "--check")
    assert (done.returncode, done.stderr) == (2, "generate.py: error: --cluster is required; see --help\n")


@pytest.mark.parametrize("script", ["launch_model_worker.py", "launch_attention_worker.py"])
def test_sigterm_ends_a_waiting_worker(tmp_path, script):
    model, attention = cluster_file(tmp_path / "c.py")
    index, address = (["--index=0"], attention) if "attention" in script else ([], model)
    process = subprocess.Popen(command(script, f"--cluster={tmp_path}/c.py", *index), stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        waiting = next(line for line in process.stderr if "waiting for" in line)
        assert address in waiting
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, said
    assert f"ended; came to {address}: connections 0" in said
