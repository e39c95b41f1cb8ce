"""Stands in for the `python` of a virtual environment, in a machine: has the warm one run what it was asked to run.

It is installed by `warm_python.install`, which writes two more names on top: SOCKET, where the warm Python listens, and
COLD, a Python to run what that cannot do. Uses little of the standard library, as starting up is what it saves.
"""

import array
import os
import resource
import signal
import socket
import sys

SOCKET: str
COLD: str

_NOT_FORWARDED = {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGCONT, signal.SIGTSTP}


def main(arguments: list[str]) -> None:
    line = socket.socket(socket.AF_UNIX)
    try:
        if not understood(arguments):
            raise OSError("not for the warm Python")
        line.connect(SOCKET)
    except OSError:
        os.execv(COLD, [COLD, *arguments])
    fds = [fd for fd in map(int, os.listdir("/proc/self/fd")) if _is_inherited(fd)]
    request = repr({"argv": arguments, "fds": fds, **process_state()}).encode()
    line.sendmsg([len(request).to_bytes(8, "little")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
    line.sendall(request)
    answers = line.makefile("r")
    first = answers.readline().split()
    if first[0] != "pid":
        os.execv(COLD, [COLD, *arguments])
    for number in signal.valid_signals() - _NOT_FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda got, _frame: os.kill(int(first[1]), got))
    # Pipes of others end when the program closes them, not when this does.
    for fd in fds:
        if fd > 2:
            os.close(fd)
    status = int(answers.readline() or 1)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def understood(arguments: list[str]) -> bool:
    """Whether it is a program to run, with no option that only counts when Python starts."""
    while arguments and arguments[0] in ("-B", "-u"):
        arguments = arguments[1:]
    return len(arguments) > 0 and (not arguments[0].startswith("-") or arguments[0] in ("-c", "-m"))


def process_state() -> dict[str, object]:
    """What a program inherits besides its file descriptors."""
    umask = os.umask(0)
    os.umask(umask)
    limits = {getattr(resource, name): 0 for name in dir(resource) if name.startswith("RLIMIT_")}
    with open("/proc/self/status") as lines:
        rights = [line for line in lines if line.startswith(("Uid", "Gid", "Cap"))]
    return {
        "cwd": os.getcwd(),
        "env": dict(os.environ),
        "umask": umask,
        "processors": sorted(os.sched_getaffinity(0)),
        "limits": {number: resource.getrlimit(number) for number in limits},
        "ignored": [int(s) for s in signal.valid_signals() if signal.getsignal(s) is signal.SIG_IGN],
        "rights": rights,
    }


def _is_inherited(fd: int) -> bool:
    try:
        return os.get_inheritable(fd)
    except OSError:
        return False  # that of the listing


if __name__ == "__main__":
    main(sys.argv[1:])
