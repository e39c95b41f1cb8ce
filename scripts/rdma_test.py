"""Checks RDMA for real, without a network card: in virtual machines with Soft-RoCE devices.

[LAMINA_KILL_SEEDS=5] [LAMINA_CONFORMANCE=all] python scripts/rdma_test.py [--only=perftest] [--keep_logs]

Needs QEMU and a few more Debian packages, which root has installed here, and a kernel, which is unpacked into .rdma/ of
the checkout. pyverbs must be importable: `make rdma`. Boots two machines that are linked, or one if that is enough for
what is asked for, runs in them what lamina_jax/testing/rdma/checks.py lists, and prints one table. Once they are up,
what they will run is compiled here (`Check.prepare`), as their processors are 20 times slower. The status is 1 if a
check failed. Every check has its time, and so have all together; the machines are powered off however this ends.
Peers and workers are killed at moments that a seed chooses, or as many seeds as LAMINA_KILL_SEEDS says. Over RDMA four
of the conformance tests are run, which must fit into ten minutes; with LAMINA_CONFORMANCE=all all that can be.

To add a check, write a function in a module of lamina_jax/testing/rdma and put a line into the list `CHECKS`:

    def link_down(machines: tuple[Machine, ...]) -> Iterator[Row]:
        a, b = machines
        job = b.start(["python", "scripts/some_worker.py"], env={"SOME": "thing"}, name="worker")
        job.wait_for("listening on", timeout_s=60)      # a regular expression, in what it writes
        a.set_link(up=False)                            # or set_loss(percent=1), cut_power()
        status = job.wait(timeout_s=60)                 # or check(..), which wants 0 and returns the output; kill(..)
        yield judged("worker ends when the link is down", status == 1, job.output)

    Check(name="link down", run=link_down, num_machines=2, limit_s=120)

Paths are the same inside and outside, but of what is written in a machine only files below `machine.folder.parent`,
which both share, come out.
Afterwards the link is brought back, jobs that still run are killed, and a process or file of /dev/shm that these have
left behind is a failure. The machines are 10.99.0.1 and 10.99.0.2; each has an RDMA device rxe0 and, on lo, rxelo. The
GID index is 1. Jobs are root's, who may lock all memory; one that may not is
["bash", "-c", 'ulimit -l 64; exec setpriv --bounding-set=-ipc_lock -- "$@"', "bash", PROGRAM, ..].
"""

import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from absl import app, flags

from lamina_jax.testing.rdma.checks import CHECKS
from lamina_jax.testing.rdma.image import WORK, prepare_image
from lamina_jax.testing.rdma.packages import SetupError
from lamina_jax.testing.rdma.report import Row, summary, table
from lamina_jax.testing.rdma.runner import Runner

_ONLY = flags.DEFINE_string("only", "", "Run only checks whose name contains this.")
_MACHINES = flags.DEFINE_integer(
    "machines", 2, "Run only checks for which so many are enough: 1 or 2.", lower_bound=1, upper_bound=2
)
_KEEP_LOGS = flags.DEFINE_bool("keep_logs", False, "Keep what machines and jobs wrote also if all passed.")
_LIMIT_S = flags.DEFINE_float("limit_s", 2400.0, "Seconds that all checks may take together.", lower_bound=1)
_WORK_DIR = flags.DEFINE_string("work_dir", str(WORK), "Where kernel and logs are.")


def main(_argv: list[str]) -> None:
    signal.signal(signal.SIGTERM, _leave)
    checks = [check for check in CHECKS if _ONLY.value in check.name and check.num_machines <= _MACHINES.value]
    if not checks:
        names = ", ".join(check.name for check in CHECKS)
        sys.exit(f"rdma_test: no check is called {_ONLY.value!r}; there are {names}")
    start = time.monotonic()
    work = Path(_WORK_DIR.value).resolve()
    try:
        image = prepare_image(work)
    except SetupError as error:
        sys.exit(f"rdma_test: {error}")
    print(f"set-up: {time.monotonic() - start:.1f} s", flush=True)
    logs = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=_logs(work)))
    runner = Runner(image=image, folder=logs, limit_s=_LIMIT_S.value, show=_show)
    try:
        runner.run(checks)
    except KeyboardInterrupt:
        sys.exit(f"rdma_test: interrupted; logs are in {logs}")
    print(f"\n{table(runner.rows)}\n{summary(runner.rows, time.monotonic() - start)}", flush=True)
    if any(row.outcome == "FAILED" for row in runner.rows):
        sys.exit(f"logs: {logs}")
    if _KEEP_LOGS.value:
        print(f"logs: {logs}")
    else:
        shutil.rmtree(logs)


def _show(row: Row) -> None:
    print(f"{row.outcome:<6} {row.name} ({row.seconds:.1f} s){': ' if row.detail else ''}{row.detail}", flush=True)


def _logs(work: Path) -> Path:
    folder = work / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _leave(_signal: int, _frame: FrameType | None) -> None:
    """As after Ctrl-C, so that the machines are powered off."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    app.run(main)
