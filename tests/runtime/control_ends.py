"""The ends of a control connection as tests hold them: links, a client of raw frames, and workers in processes."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import control_peer
import msgspec
import zmq
from control_peer import NAME, Pong

from lamina_jax.runtime import control_wire as wire
from lamina_jax.runtime.cluster_key import ClusterKey
from lamina_jax.runtime.control_tcp import ControlLink, PeerInfo, Session, peer_info

LOOPBACK = "tcp://127.0.0.1:0"
HERE = peer_info()


def ignore(_: str) -> None: ...


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.01)
    return result


@contextlib.contextmanager
def linked(address: str, key: ClusterKey | None, info: PeerInfo = HERE) -> Iterator[ControlLink]:
    link = ControlLink(address, key, Pong, NAME, info)
    try:
        yield link
    finally:
        link.close()


def received(end: Session | ControlLink) -> Any:
    message = end.receive(timeout_ms=20_000)
    assert message is not None
    return message


@contextlib.contextmanager
def process(
    role: str, address: str, key_file: Path | None
) -> Iterator[tuple[subprocess.Popen[str], Callable[[], str]]]:
    """A `control_peer` and what reads its next line."""
    command = [sys.executable, str(control_peer.__file__), role, address, str(key_file or "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        lines = child.stdout
        assert lines is not None
        try:
            yield child, lambda: lines.readline().strip()
        finally:
            child.kill()


class Raw:
    """A client that says whatever it wants in frames."""

    def __init__(self, address: str, key: ClusterKey | None, own: tuple[bytes, bytes] | None = None):
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.sndhwm = 0
        if key is not None:
            self.socket.curve_serverkey = key.public
            self.socket.curve_publickey, self.socket.curve_secretkey = own or (key.public, key.secret)
        self.socket.connect(address)

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def say(self, session: bytes, sequence: int, message: Any) -> list[bytes]:
        frames = wire.pack(session, sequence, wire.encode(message))
        self.socket.send_multipart(frames)
        return frames

    def hear(self) -> Any:
        assert self.socket.poll(20_000)
        return wire.unpack(self.socket.recv_multipart(), msgspec.msgpack.Decoder(Pong | wire.ToEngine))[2]

    def open(self) -> bytes:
        """Opens a session and returns its number."""
        self.say(bytes(16), 0, wire.Open(HERE))
        return self.hear().session

    def hears_nothing(self) -> bool:
        return self.socket.poll(0) == 0
