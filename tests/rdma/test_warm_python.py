"""The Python that forks for programs: what these are and do is what a Python of their own would be and do."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

import pytest

from lamina_jax.testing.rdma import warm_python

ENTRY = """
import sys
from lamina_jax.testing.rdma import warm_python
warm_python.import_all(["colorsys"])
warm_python.run(warm_python.serve(sys.argv[1]).argv)
"""
SPAWNS = """
import multiprocessing, os, sys
def f(x): return x * 2, os.getpid()
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        got, pid = pool.apply(f, (21,))
        print(got, pid != os.getpid())
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Path of a `python` whose programs are forked."""
    folder = tmp_path_factory.mktemp("warm")
    log = (folder / "log").open("w")
    server = subprocess.Popen([sys.executable, "-c", ENTRY, folder / "socket"], stdout=log, stderr=log)
    deadline = time.monotonic() + 60
    while "ready" not in (folder / "log").read_text():
        if server.poll() is not None or time.monotonic() > deadline:
            pytest.fail((folder / "log").read_text())
        time.sleep(0.02)
    script = warm_python.install(folder, folder / "socket", cold=folder / "cold")
    subprocess.run(["bash", "-ec", script], check=True)
    yield folder / "python"
    server.kill()
    server.wait()
    log.close()


def run(*command, **options):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60, **options)


@contextlib.contextmanager
def started(*command):
    """A process, and its output."""
    # What a job in the background ignores its children would ignore, too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            yield process, process.stdout
    finally:
        signal.signal(signal.SIGINT, before)


def test_shares_what_is_imported_and_nothing_else(python):
    first = run(python, "-c", "import sys; print('colorsys' in sys.modules); import wave")
    second = run(python, "-c", "import sys; print('colorsys' in sys.modules, 'wave' in sys.modules)")
    assert (first.stdout, second.stdout) == ("True\n", "True False\n")


def test_arguments_environment_folder_streams_and_limits(python, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, resource, sys\n"
        "print(sys.argv[1:], sys.path[0], os.environ['WORD'], os.getcwd(), __name__, file=sys.stderr)\n"
        "print(sys.stdin.read(), resource.getrlimit(resource.RLIMIT_NOFILE)[0], end='')\n"
    )
    limited = f"ulimit -Sn 123; exec {python} {script} a 'b c'"
    got = run("bash", "-c", limited, input="hello", cwd="/", env={**os.environ, "WORD": "w"})
    assert (got.stdout, got.returncode) == ("hello 123", 0)
    assert got.stderr.split() == ["['a',", "'b", "c']", str(tmp_path), "w", "/", "__main__"]


def test_processors_are_those_of_who_asked_and_not_those_of_the_warm_python(python):
    show = "import os; print(*sorted(os.sched_getaffinity(0)))"
    allowed = sorted(os.sched_getaffinity(0))
    for processors in (allowed, allowed[-1:]):
        names = " ".join(map(str, processors))
        got = run("taskset", "-c", names.replace(" ", ","), python, "-c", show)
        assert got.stdout.strip() == names


def test_modules_and_spawned_processes(python, tmp_path):
    assert run(python, "-m", "json.tool", input="{}").stdout == "{}\n"
    (tmp_path / "spawns.py").write_text(SPAWNS)
    assert run(python, tmp_path / "spawns.py").stdout == "42 True\n"


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(7)", 7), ("1/0", 1), ("import os; os.abort()", -6)])
def test_ends_as_the_program_does(python, code, status):
    assert run(python, "-c", code).returncode == status


def test_a_program_may_close_its_output(python):
    got = run(python, "-c", "import sys; print('last words'); sys.stdout.close()")
    assert (got.stdout, got.stderr, got.returncode) == ("last words\n", "", 0)


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGTERM, -15), (signal.SIGINT, -2)])
def test_signals_reach_the_program(python, number, ends):
    with started(python, "-c", "print(flush=True); import time; time.sleep(60)") as (process, output):
        output.readline()
        process.send_signal(number)
        assert process.wait(30) == ends


def test_a_client_that_is_killed_takes_the_program_along(python):
    code = "import os; print(os.getpid(), flush=True); import time; time.sleep(600)"
    with started(python, "-c", code) as (process, output):
        pid = int(output.readline())
        assert pid != process.pid
        with open(os.pidfd_open(pid)) as program:
            process.kill()
            ended, _, _ = select.select([program], [], [], 30)
    assert ended


def test_what_only_counts_at_the_start_starts_a_python_of_its_own(python):
    got = run(python, "-I", "-c", "import sys; print(sys.flags.isolated, sys.executable, 'colorsys' in sys.modules)")
    assert got.stdout == f"1 {python.parent / 'cold'} False\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="gives up rights of root")
def test_fewer_rights_start_a_python_of_its_own(python):
    got = run("setpriv", "--bounding-set=-ipc_lock", "--", python, "-c", "import sys; print('colorsys' in sys.modules)")
    assert got.stdout == "False\n"
