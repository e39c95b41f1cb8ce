"""Programs for a GPU, really compiled, by the environment that `make aot` makes."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-aot" / "bin" / "python"
CHECK = [PYTHON, "scripts/aot_check.py", "--model=configs/models/llama3_8b.json", "--targets=h100"]
CHECK += ["--kernels=xla", "--kv_cache_dtypes=auto"]

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="needs XLA's CUDA compiler: run `make aot`")


def check(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([*CHECK, *flags], cwd=ROOT, capture_output=True, text=True, timeout=500)


def test_slices_are_in_order_and_each_is_one_graph():
    result = check("--dop=2,4", "--steps=16x1", "--context=512")
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in line.split("|")] for line in result.stdout.splitlines() if "|" in line]
    slices = [row for row in rows if "slice" in row[1]]
    assert len(slices) == 3
    for row in slices:
        assert row[-2] == f"1 with {row[-3]} launches"


def test_a_worker_that_does_not_fit_fails_the_check():
    result = check("--dop=1,1", "--steps=16x1", "--context=512", "--cache_fraction=0.99")
    assert result.returncode == 1
    assert "attention worker (xla) on h100" in result.stderr
    assert "too much" in result.stderr


@pytest.mark.parametrize(
    ("flag", "message"),
    [("--dop=2,3", "multiple"), ("--dop=3,3", "divide"), ("--targets=b200", "unknown target")],
)
def test_mistakes_are_told_without_a_traceback(flag, message):
    result = check("--steps=16x1", flag)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
