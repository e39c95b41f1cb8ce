"""What is compiled here is found by machines, whatever their processors."""

import subprocess
import sys

import pytest

from lamina_jax.testing.rdma.programs import cache_settings, run_here

# The second process stands for one of a machine: it looks for programs of another processor.
PROGRAM = """
import subprocess, sys
import jax
from jaxlib import xla_client
if sys.argv[1:] == ["child"]:
    def other(devices):
        raise AssertionError("asked for the processor")
    xla_client.get_topology_for_devices = other
jax.jit(lambda x: x * 3 + 1)(2.0)
if not sys.argv[1:]:
    subprocess.run([sys.executable, __file__, "child"], check=True)
"""


def test_programs_are_compiled_once_for_all_processors(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    run_here([sys.executable, program], folder=tmp_path, cwd=tmp_path, timeout_s=120.0)
    compiled = sorted(path.name for path in (tmp_path / "jax-cache").glob("*-cache"))
    assert [name.rpartition("-")[0].rpartition("-")[0] for name in compiled] == ["jit__lambda"]


def test_without_sharing_the_processor_is_asked_for(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **cache_settings(tmp_path)}
    run = subprocess.run(
        [sys.executable, program, "child"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert "asked for the processor" in run.stderr


def test_a_program_that_fails_says_so(tmp_path):
    with pytest.raises(RuntimeError, match="ended with status 3\nbefore the end"):
        run_here(
            [sys.executable, "-c", "print('before the end'); raise SystemExit(3)"],
            folder=tmp_path,
            cwd=tmp_path,
            timeout_s=60.0,
        )


def test_a_program_that_may_fail_says_what_it_has_written(tmp_path):
    command = [sys.executable, "-c", "print('before the end'); raise SystemExit(3)"]
    assert run_here(command, folder=tmp_path, cwd=tmp_path, timeout_s=60.0, may_fail=True) == "before the end\n"
