"""The control sockets: typed messages (`lamina_jax.runtime.messages`) over ZeroMQ.

The engine listens on a socket file in a directory that only its user may enter, so nobody else can speak to it.
"""

import os
import shutil
import tempfile
import threading
from typing import Final

import msgspec
import zmq

from lamina_jax.runtime.messages import FromWorker, ToWorker

_LINGER_MS: Final = 200
_MAX_PARENT: Final = 80


class ControlServer:
    """The engine's end: one socket, workers known by their index once they have said Hello."""

    def __init__(self) -> None:
        parent = tempfile.gettempdir()
        # The path of a Unix socket has at most 107 bytes.
        self._directory = tempfile.mkdtemp(prefix="lamina-", dir=parent if len(parent) < _MAX_PARENT else "/tmp")
        self.address = f"ipc://{self._directory}/control"
        self._socket = zmq.Context.instance().socket(zmq.ROUTER)
        try:
            self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
            self._socket.bind(self.address)
        except BaseException:
            self.close()
            raise
        # One thread tells workers of steps while another asks how they are.
        self._lock = threading.Lock()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromWorker)

    def send(self, peer: bytes, message: ToWorker) -> None:
        """Queues a message for the worker that was seen as `peer`."""
        with self._lock:
            self._socket.send_multipart([peer, self._encoder.encode(message)])

    def receive(self, timeout_ms: int) -> tuple[bytes, FromWorker] | None:
        """The next message and who sent it, or None if there is none within `timeout_ms`."""
        with self._lock:
            if not self._socket.poll(timeout_ms):
                return None
            peer, body = self._socket.recv_multipart()
        return peer, self._decoder.decode(body)

    def remove_files(self) -> None:
        """Removes the socket's directory: who is connected stays so, nobody else can come, and nothing is left behind
        whatever happens to this process."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def close(self) -> None:
        """Closes the socket and removes its directory. May be called twice."""
        self._socket.close()
        self.remove_files()


class ControlClient:
    """A worker's end."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._socket = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.connect(address)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToWorker)

    def send(self, message: FromWorker) -> None:
        """Queues a message for the engine."""
        self._socket.send(self._encoder.encode(message))

    def receive(self, timeout_ms: int) -> ToWorker | None:
        """The next message, or None if there is none within `timeout_ms`."""
        if not self._socket.poll(timeout_ms):
            return None
        return self._decoder.decode(self._socket.recv())

    def close(self) -> None:
        """Sends what is queued, for a short while, and closes the socket."""
        self._socket.close()
        zmq.Context.instance().term()

    def remove_files(self) -> None:
        """Removes the engine's socket directory, when the engine died and cannot."""
        shutil.rmtree(os.path.dirname(self._address.removeprefix("ipc://")), ignore_errors=True)
