"""Faults of RDMA in a worker, when they are asked for. Run by `cluster_checks.py`.

    python -m lamina_jax.testing.rdma.faults FIFO scripts/launch_attention_worker.py ARGUMENT..

Runs a launch script in this process, which is not privileged to lock memory beyond `ulimit -l`, and does what the lines
name that somebody writes to FIFO, which is made: those of `FAULTS`, of which "sound" undoes the two before it.
"""

import ctypes
import os
import resource
import runpy
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from lamina_jax.runtime.attention_worker import AttentionWorker
from lamina_jax.runtime.messages import RunStep
from lamina_jax.transport import rc_queue_pair, verbs

_ERROR_STATE: Final = 6  # IBV_QPS_ERR
_CAPABILITY_VERSION: Final = 0x20080522  # _LINUX_CAPABILITY_VERSION_3
_CAP_IPC_LOCK: Final = 14
_LITTLE_BYTES: Final = 4096
_LATE_S: Final = 0.3


class SmallCompletionQueue(rc_queue_pair.CompletionQueue):
    """One that overruns when it holds two completions, however many were asked for."""

    def __init__(self, pd: Any, depth: int, *, wakes: bool):
        del depth
        super().__init__(pd, 1, wakes=wakes)


def fail_queue_pair(end: "verbs._End") -> None:
    """Has a channel's queue pair fail, as a NIC does with one that it cannot serve any more."""
    end._qp._modify(rc_queue_pair._QpAttr(qp_state=_ERROR_STATE), 1, "ERR")


def _fail_queue_pairs() -> None:
    for end in list(verbs._ends):
        with end._closing:
            if not end._closed:
                fail_queue_pair(end)


def _lock_little_memory() -> None:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (_LITTLE_BYTES, resource.RLIM_INFINITY))


def _overrun_completion_queues() -> None:
    """From the next session on: steps begin late, so that queues hold what messages come meanwhile."""
    dispatch = AttentionWorker.dispatch

    def late(self: AttentionWorker, message: RunStep) -> None:
        time.sleep(_LATE_S)
        dispatch(self, message)

    AttentionWorker.dispatch = late
    verbs.CompletionQueue = SmallCompletionQueue

    def undo() -> None:
        AttentionWorker.dispatch = dispatch
        verbs.CompletionQueue = rc_queue_pair.CompletionQueue

    _undo.append(undo)


def _be_sound() -> None:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    while _undo:
        _undo.pop()()


_undo: list[Callable[[], None]] = []
FAULTS: Final[dict[str, Callable[[], None]]] = {
    "queue pairs fail": _fail_queue_pairs,
    "little memory": _lock_little_memory,
    "completion queues overrun": _overrun_completion_queues,
    "sound": _be_sound,
}


def _obey(fifo: Path) -> None:
    while True:
        with fifo.open() as lines:
            for line in lines:
                FAULTS[line.strip()]()


def _give_up_capability(number: int) -> None:
    """Takes one of the first 32 capabilities from this thread, and those that it starts from now on."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    # Effective, permitted, inheritable; then the same of those above 32.
    sets = (ctypes.c_uint32 * 6)()
    for call in (libc.capget, libc.capset):
        if call(header, sets) != 0:
            raise OSError(ctypes.get_errno(), "cannot give a capability up")
        sets[0] &= ~(1 << number)


def main(fifo: str, script: str, *arguments: str) -> None:
    """Runs the script until it ends."""
    _be_sound()
    _give_up_capability(_CAP_IPC_LOCK)
    # One that was killed has left its own.
    Path(fifo).unlink(missing_ok=True)
    os.mkfifo(fifo)
    threading.Thread(target=_obey, args=(Path(fifo),), name="faults", daemon=True).start()
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
