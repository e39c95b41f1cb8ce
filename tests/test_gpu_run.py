"""scripts/gpu_run.py, and what `make gpu-wheels` downloads: what a CPU can show of them."""

import importlib.metadata
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import gpu_run
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
THERE = {"jax", "jaxlib", "numpy", "scipy", "ml-dtypes", "opt-einsum"}
"""What comes with the machine's JAX."""
NOT_NEEDED = {"huggingface-hub"}
"""Only for downloads of tokenizers."""


def needs(name: str) -> set[str]:
    """Of a package that is installed here what it needs, directly."""
    asked = [Requirement(line) for line in importlib.metadata.requires(name) or []]
    return {canonicalize_name(r.name) for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})}


def test_all_that_the_runtime_and_its_tests_need_is_downloaded():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    todo = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]} | set(gpu_run._TESTED_WITH)
    found: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in found | THERE | NOT_NEEDED:
            found.add(name)
            todo |= needs(name)
    listed = {canonicalize_name(name) for name in gpu_run._listed()}
    assert found <= listed
    # Extras of these, and a faster build.
    assert listed - found == {"fsspec", "zipp", "ninja"}


def test_every_wheel_has_a_version():
    pinned = {
        canonicalize_name(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines() if line
    }
    assert {canonicalize_name(name) for name in gpu_run._listed()} <= pinned


def part(name: str, body: str, **options) -> gpu_run.Part:
    return gpu_run.Part(name=name, command=[sys.executable, "-c", body], **{"sure_s": 5.0, **options})


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_run, "LOGS", tmp_path / "logs")


@pytest.mark.usefixtures("in_folder")
def test_neither_a_failure_nor_a_hang_hides_the_parts_behind_it(capfd):
    hang = (
        "import subprocess, time; subprocess.Popen(['sleep', '77.125']); print('waiting', flush=True); time.sleep(60)"
    )
    parts = [
        part("fails", "raise SystemExit('broken here')"),
        part("hangs", hang),
        part("works", "print('{seconds}')", shows=True, sure_s=20.0),
    ]
    start = time.monotonic()
    results = list(gpu_run.run_parts(parts, deadline=start + 30, has_gpu=False))
    assert time.monotonic() - start < 25
    assert [(r.name, r.outcome) for r in results] == [("fails", "FAILED"), ("hangs", "FAILED"), ("works", "passed")]
    assert re.match(r"its time was up after \d+ s; nothing done", results[1].detail)
    commands = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "sleep 77.125" not in commands
    printed = capfd.readouterr().out
    assert "broken here" in printed
    assert "waiting" in printed
    assert re.search(r"^[1-9]$", printed, re.MULTILINE)  # about 20 s were left for it, less 15


TEST_FILE = """
import pytest, time

@pytest.mark.parametrize("way", ["with spaces"])
def test_good(way): pass

@pytest.mark.skip(reason="needs a GPU")
def test_skipped(): pass
"""
BAD = "\ndef test_bad(): assert False\n"
HANG = "\ndef test_hangs(): time.sleep(60)\n"
ONLY_SKIPPED = TEST_FILE.replace("def test_good", "@pytest.mark.skip(reason='needs a GPU')\ndef test_good")


@pytest.mark.usefixtures("in_folder")
@pytest.mark.parametrize(
    ("body", "has_gpu", "outcome", "detail"),
    [
        (TEST_FILE, False, "passed", r"1 passed, 1 skipped \(needs a GPU\)"),
        (TEST_FILE, True, "FAILED", r"1 passed, 1 skipped \(needs a GPU\)"),
        (TEST_FILE.replace("needs a GPU", "no"), True, "passed", r"1 passed, 1 skipped \(no\)"),
        (TEST_FILE + BAD, False, "FAILED", r"1 passed, 1 skipped, 1 failed \(needs a GPU\)"),
        (
            TEST_FILE + HANG,
            True,
            "FAILED",
            r"its time was up after \d+ s in \S*test_it.py::test_hangs; 1 passed, 1 ski",
        ),
        (ONLY_SKIPPED, False, "skipped", r"2 skipped \(needs a GPU\)"),
        (ONLY_SKIPPED, True, "FAILED", r"2 skipped \(needs a GPU\)"),
        ("syntax error", True, "FAILED", "no test ran, status 2"),
    ],
)
def test_outcomes_of_tests_are_counted(tmp_path, body, has_gpu, outcome, detail):
    (tmp_path / "test_it.py").write_text(body)
    command = [sys.executable, "-m", "pytest", "-v", "-rs", "-p", "no:cacheprovider", "test_it.py"]
    it = gpu_run.Part(name="it", command=command, sure_s=1.0, tests=True)
    limit = 8.0 if body.endswith(HANG) else 60.0
    (result,) = gpu_run.run_parts([it], deadline=time.monotonic() + limit, has_gpu=has_gpu)
    assert result.outcome == outcome
    assert re.match(detail, result.detail), result.detail


def test_table_comes_with_every_part(capfd):
    gpu_run.print_table([gpu_run.Result(name="build", outcome="passed", detail="with CUDA", seconds=12.3)])
    assert capfd.readouterr().out == (
        "\n| part  | result            | seconds |\n"
        "|-------|-------------------|---------|\n"
        "| build | passed: with CUDA |      12 |\n"
    )


@pytest.mark.usefixtures("in_folder")
def test_what_is_missing_is_named(tmp_path, monkeypatch):
    """Packages too old for us are installed like those that are not there; without wheels that is an error."""
    for name in ("requirements-gpu.txt", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    versions = {"flax": "0.8.0", "zipp": None}
    monkeypatch.setattr(gpu_run, "_version", lambda name: versions.get(name, _real(name)))
    monkeypatch.setattr(gpu_run, "SITE", tmp_path / "site")
    monkeypatch.setattr(gpu_run, "WHEELS", tmp_path / "none")
    with pytest.raises(RuntimeError, match=r"^no flax here, nor a wheel in none: run `make gpu-wheels`"):
        gpu_run.install_missing()
    versions["flax"] = _real("flax")
    assert gpu_run.install_missing().endswith(" were there; without zipp")


def _real(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@pytest.mark.usefixtures("in_folder")
def test_no_gpu_is_no_error_and_a_gpu_that_jax_does_not_see_is(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(gpu_run.shutil, "which", lambda name: f"/bin/{name}")
    assert gpu_run.check_machine(gpu_run.Machine(gpu=None, jax_gpu=None, nvcc=None, facts={})).startswith("no GPU")
    with pytest.raises(RuntimeError, match="nvidia-smi shows H200, but JAX finds no GPU"):
        gpu_run.check_machine(gpu_run.Machine(gpu="H200", jax_gpu=None, nvcc="/bin/nvcc", facts={}))
    with pytest.raises(RuntimeError, match="no nvcc"):
        gpu_run.check_machine(gpu_run.Machine(gpu="H200", jax_gpu="NVIDIA H200", nvcc=None, facts={}))
