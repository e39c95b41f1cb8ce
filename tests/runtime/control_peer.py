"""One end of a control connection in a process of its own, and the messages that the tests send.

Run as `control_peer.py worker|engine ADDRESS KEY_FILE`; an empty KEY_FILE is no key. A worker prints its address,
answers every Ping, and prints its counters (JSON) on SIGUSR1. An engine opens a session, prints "open", and at last the
error that ends it.
"""

import dataclasses
import json
import signal
import sys

import msgspec

from lamina_jax.runtime.cluster_key import load_key_file
from lamina_jax.runtime.control_tcp import ControlLink, ControlListener, SessionEnded, peer_info
from lamina_jax.runtime.errors import WorkerError

NAME = "attention worker 1"


class Ping(msgspec.Struct, tag=True):
    """Engine: answer this."""

    number: int
    data: bytes = b""


class Pong(msgspec.Struct, tag=True):
    """Worker: answered."""

    number: int


def work(address: str, key_file: str) -> None:
    """Serves one session after another, for ever."""
    listener = ControlListener(address, load_key_file(key_file) if key_file else None, Ping, NAME, peer_info())
    tell = lambda *_: print(json.dumps(dataclasses.asdict(listener.counters)), flush=True)  # noqa: E731
    signal.signal(signal.SIGUSR1, tell)
    print(listener.address, flush=True)
    while True:
        session = listener.accept(timeout_ms=1000)
        if session is None:
            continue
        try:
            while True:
                if (message := session.receive(timeout_ms=1000)) is not None:
                    session.send(Pong(message.number))
        except SessionEnded as ended:
            session.close(str(ended))


def command(address: str, key_file: str) -> None:
    """Opens a session and waits for its end."""
    link = ControlLink(address, load_key_file(key_file) if key_file else None, Pong, NAME, peer_info())
    link.open(60.0, lambda text: print(text, file=sys.stderr))
    print("open", flush=True)
    try:
        while True:
            link.receive(timeout_ms=1000)
    except WorkerError as error:
        print(error, flush=True)
    link.close()


if __name__ == "__main__":
    {"worker": work, "engine": command}[sys.argv[1]](*sys.argv[2:])
