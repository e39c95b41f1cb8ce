"""A Python that has imported what programs of the project import, and becomes any of them in a moment.

    python -m lamina_jax.testing.rdma.warm_python SOCKET MODULE...

In a machine `import jax` takes 20 s, and a dozen programs are started. This one imports modules once, and forks for
each program that `warm_client.py`, installed as `python`, asks for. A program so started is a process of its own, with
the arguments, environment, file descriptors, processors, limits and signals of the one that asked, a session of its
own, and all of Python's ways to end; it shares only what was imported. It lives as long as who asked: the client passes
signals on, ends with its status, and takes it along when killed. A client with fewer rights than this process starts
its own.
"""

import ast
import atexit
import contextlib
import dataclasses
import fcntl
import gc
import importlib
import os
import resource
import runpy
import selectors
import signal
import socket
import sys
import threading
import traceback
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from lamina_jax.testing.rdma import programs, warm_client

_CLIENT: Final = Path(warm_client.__file__)
OF_ATTENTION_WORKERS: Final = (
    "lamina_jax.runtime.attention_worker",
    "lamina_jax.runtime.checks",
    "lamina_jax.transport.verbs",
    "ml_collections",
)
"""What attention workers import, and most of what tests of channels do."""
OF_ALL: Final = (
    *OF_ATTENTION_WORKERS,
    "lamina_jax.engine.llm",
    "lamina_jax.runtime.cluster_workers",
    "lamina_jax.runtime.model_server",
    "lamina_jax.runtime.remote_model",
)
"""What engines and model workers import, too."""
_PYTHON_SIGNALS: Final = (signal.SIGPIPE, signal.SIGXFSZ)
"""Python ignores these from its start on, so they tell nothing of who asked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Request:
    argv: list[str]
    fds: list[int]
    cwd: str
    env: dict[str, str]
    umask: int
    processors: list[int]
    limits: dict[int, tuple[int, int]]
    ignored: list[int]
    rights: list[str]


def install(folder: Path, socket_path: Path, cold: Path) -> str:
    """Bash that puts the client in the place of the programs `python` and `python3` in `folder`.

    Args:
        folder: The `bin` of a virtual environment.
        socket_path: Where the warm Python listens.
        cold: Where to leave a Python of the same environment that starts as ever; a path in `folder`.
    """
    real = Path(sys.executable).resolve()
    text = f"#!{real} -IS\nSOCKET = {str(socket_path)!r}\nCOLD = {str(cold)!r}\n{_CLIENT.read_text()}"
    return f"""
        ln -sf {real} {cold}
        cat > {folder}/.client <<'END-OF-CLIENT'
{text}
END-OF-CLIENT
        chmod 755 {folder}/.client
        ln -f {folder}/.client {folder}/.client3
        mv -f {folder}/.client {folder}/python
        mv -f {folder}/.client3 {folder}/python3
    """


def import_all(modules: Sequence[str]) -> None:
    """Imports modules by their names, and stays on one processor: where two machines import at the same time, moving to
    and fro took one of them as long again as the work.
    """
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    # Hardly anything is garbage, and to look for it is a sixth of the work.
    gc.disable()
    for module in modules:
        importlib.import_module(module)
    gc.enable()
    programs.share_programs()


def serve(path: str) -> _Request:
    """Forks for every client. Returns in a child only: what it is to run, all else being as the client has it."""
    with contextlib.ExitStack() as own:
        listener = own.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(64)
        ended, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        own.callback(os.close, ended)
        own.callback(os.close, wake)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        own.callback(signal.set_wakeup_fd, -1)
        selector = own.enter_context(selectors.DefaultSelector())
        selector.register(listener, selectors.EVENT_READ)
        selector.register(ended, selectors.EVENT_READ)
        clients: dict[int, socket.socket] = {}
        own.callback(lambda: [client.close() for client in clients.values()])
        # Garbage collection in a child would touch, and so copy, all that it shares.
        gc.freeze()
        print(f"ready, pid {os.getpid()}", flush=True)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    forked = _fork(listener.accept()[0], clients, selector)
                    if forked is not None:
                        own.close()
                        _become(*forked)
                        return forked[0]
                elif key.fd == ended:
                    os.read(ended, 4096)
                elif (pid := next((pid for pid, client in clients.items() if client is key.fileobj), None)) is not None:
                    # It says nothing more: it was killed.
                    selector.unregister(key.fileobj)
                    _kill(pid)
            _tell_ends(clients, selector)


def _fork(
    client: socket.socket, clients: dict[int, socket.socket], selector: selectors.BaseSelector
) -> tuple[_Request, list[int]] | None:
    """Takes a client's request and forks. Returns, in the child only, the request and the client's descriptors."""
    try:
        request, fds = _receive(client)
    except (OSError, ValueError, SyntaxError, TypeError):
        traceback.print_exc()
        client.close()
        return None
    allowed = request.rights == warm_client.process_state()["rights"]
    with warnings.catch_warnings():
        # JAX warns of its threads, of which there is none before it computes something.
        warnings.simplefilter("ignore")
        child = os.fork() if allowed else None
    if child == 0:
        client.close()
        return request, fds
    for fd in fds:
        os.close(fd)
    with contextlib.suppress(OSError):
        client.sendall(b"refused\n" if child is None else f"pid {child}\n".encode())
    if child is None:
        client.close()
    else:
        clients[child] = client
        selector.register(client, selectors.EVENT_READ)
    return None


def _tell_ends(clients: dict[int, socket.socket], selector: selectors.BaseSelector) -> None:
    """Reaps programs that have ended, and tells their clients how."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
            client = clients.pop(ended[0])
            with contextlib.suppress(KeyError):
                selector.unregister(client)
            with contextlib.suppress(OSError):
                client.sendall(f"{os.waitstatus_to_exitcode(ended[1])}\n".encode())
            client.close()


def _receive(client: socket.socket) -> tuple[_Request, list[int]]:
    client.settimeout(10.0)
    head, fds, _, _ = socket.recv_fds(client, 8, 1024)
    size, text = int.from_bytes(head, "little"), b""
    while len(text) < size:
        if not (more := client.recv(size - len(text))):
            raise ValueError("a client broke off")
        text += more
    client.settimeout(None)
    return _Request(**ast.literal_eval(text.decode())), list(fds)


def _become(request: _Request, fds: list[int]) -> None:
    """Makes this process what the client's would be after exec."""
    os.setsid()
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, max(request.fds, default=0) + 200) for fd in fds]
    for fd in fds:
        os.close(fd)
    for fd, target in zip(high, request.fds, strict=True):
        os.dup2(fd, target, inheritable=True)
        os.close(fd)
    os.chdir(request.cwd)
    os.umask(request.umask)
    os.sched_setaffinity(0, request.processors)
    os.environ.clear()
    os.environ.update(request.env)
    for number, limits in request.limits.items():
        resource.setrlimit(number, limits)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in set(request.ignored) - set(_PYTHON_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through="PYTHONUNBUFFERED" in request.env)  # pyright: ignore[reportAttributeAccessIssue]


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def run(argv: list[str]) -> NoReturn:
    """Runs a program as Python's command line would, and ends this process as that ends."""
    status = 0
    try:
        _run(argv)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        status = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        status = 1
    # What Python does when it ends, but for taking apart what was imported.
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError):  # the program has closed it
            stream.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)


def _run(argv: list[str]) -> None:
    while argv[0] in ("-B", "-u"):
        argv = argv[1:]
    match argv[0]:
        case "-c":
            sys.argv = ["-c", *argv[2:]]
            sys.path[0] = ""
            main: Any = types.ModuleType("__main__")
            main.__builtins__ = __builtins__
            sys.modules["__main__"] = main
            exec(compile(argv[1], "<string>", "exec"), main.__dict__)
        case "-m":
            sys.argv = argv[1:]
            sys.path[0] = os.getcwd()
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        case script:
            sys.argv = argv
            sys.path[0] = str(Path(script).resolve().parent)
            runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    import_all(sys.argv[2:])
    run(serve(sys.argv[1]).argv)
