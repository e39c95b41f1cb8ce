"""Runs in a virtual machine: starts, signals and reaps the jobs that the host asks for. Standard library only.

    guest_agent.py SHARED_MEMORY_FOLDER

File descriptor 0 is the line to the host, in both directions; requests and events are objects of JSON, one a line:

    {"do": "start", "job": 3, "argv": [..], "env": {..}, "cwd": "..", "output": "..", "stays": false}    its own session
    {"do": "signal", "job": 3, "signal": 9, "group": true}                                nothing if it has ended
    {"do": "reset", "job": 4}    kills what jobs have left behind, but those that stay, and empties the folder

    {"event": "ready"}
    {"event": "started", "job": 3, "pid": 123}
    {"event": "refused", "job": 3, "why": ".."}             it could not be started
    {"event": "ended", "job": 3, "status": -9}              as in subprocess: negative for a signal
    {"event": "reset", "job": 4, "left": ["sleep 60", "/dev/shm/x"]}

It ends, with all that its jobs have started, when the host hangs up.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

_LINE = 0
_PR_SET_CHILD_SUBREAPER = 36


class Agent:
    """Jobs by number, and the line to the host."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child_was_started = threading.Condition(self._lock)
        self._job_of_pid: dict[int, int] = {}
        self._pid_of_job: dict[int, int] = {}
        self._staying: set[int] = set()

    def serve(self) -> None:
        """Does what it is asked until the host hangs up."""
        # What a job leaves behind becomes a child of ours, to be found and reaped.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._tell(event="ready")
        threading.Thread(target=self._reap, daemon=True).start()
        for request in _lines():
            match request.pop("do"):
                case "start":
                    self._start(**request)
                case "signal":
                    self._signal(**request)
                case "reset":
                    _wait_for_children(self._staying)
                    left = _kill_descendants(self._staying) + _empty(Path(sys.argv[1]))
                    with self._lock:
                        self._tell(event="reset", job=request["job"], left=left)
        _kill_descendants()

    def _start(self, job: int, argv: list[str], env: dict[str, str], cwd: str, output: str, stays: bool) -> None:
        with self._lock:
            try:
                with open(output, "wb") as file:
                    process = subprocess.Popen(
                        argv,
                        env=env,
                        cwd=cwd,
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
            except OSError as error:
                self._tell(event="refused", job=job, why=str(error))
                return
            # The reaper waits for it, not this object.
            process.returncode = 0
            self._job_of_pid[process.pid], self._pid_of_job[job] = job, process.pid
            if stays:
                self._staying.add(process.pid)
            self._tell(event="started", job=job, pid=process.pid)
            self._child_was_started.notify()

    def _signal(self, job: int, signal: int, group: bool) -> None:
        with self._lock, contextlib.suppress(ProcessLookupError):
            if (pid := self._pid_of_job.get(job)) is not None and (group or pid in self._job_of_pid):
                (os.killpg if group else os.kill)(pid, signal)

    def _reap(self) -> None:
        while True:
            try:
                # Without the lock and without reaping: a job that ends at once is reaped after it was entered.
                os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            except ChildProcessError:
                with self._lock:
                    while not self._job_of_pid:
                        self._child_was_started.wait()
                continue
            with self._lock, contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(-1, os.WNOHANG)
                if (job := self._job_of_pid.pop(pid, None)) is not None:
                    self._tell(event="ended", job=job, status=os.waitstatus_to_exitcode(status))

    @staticmethod
    def _tell(**event: object) -> None:
        line = json.dumps(event).encode() + b"\n"
        while line:
            line = line[os.write(_LINE, line) :]


def _lines():
    rest = b""
    while data := os.read(_LINE, 65536):
        *lines, rest = (rest + data).split(b"\n")
        yield from map(json.loads, lines)


def _wait_for_children(staying: set[int], limit_s: float = 10.0) -> None:
    """A job that stays ends what it runs for jobs that were killed, which takes it a moment."""
    deadline = time.monotonic() + limit_s
    while _descendants(staying) - staying and time.monotonic() < deadline:
        time.sleep(0.02)


def _kill_descendants(staying: set[int] | None = None, limit_s: float = 10.0) -> list[str]:
    """Kills all that descends from this process, but those that stay. Returns their command lines."""
    killed: dict[int, str] = {}
    deadline = time.monotonic() + limit_s
    while (alive := _descendants({os.getpid()}) - {os.getpid()} - (staying or set())) and time.monotonic() < deadline:
        for pid in alive:
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                os.kill(pid, signal.SIGKILL)
                # One that is about to end has no command line any more, so nobody left it.
                if command:
                    killed.setdefault(pid, command.decode(errors="replace").strip())
        time.sleep(0.02)
    for pid in alive - killed.keys():
        killed[pid] = f"process {pid}, which does not end"
    return list(killed.values())


def _empty(folder: Path) -> list[str]:
    """Removes what is in a folder. Returns its paths."""
    found = sorted(folder.iterdir())
    for path in found:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return [str(path) for path in found]


def _descendants(ancestors: set[int]) -> set[int]:
    """These, and the living processes below them."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                # After the name, which may hold anything, come state and parent.
                state, parent = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents[int(entry)] = int(parent)
    found = set(ancestors)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


if __name__ == "__main__":
    Agent().serve()
