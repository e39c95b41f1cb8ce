"""One end of a control connection in a process of its own, and the messages that the tests send.

Run as `control_peer.py worker|engine ADDRESS KEY_FILE`. A worker prints its address and answers every Ping; with it, its
counters. An engine opens a session, prints "open", and at last the error that ends it. Both print one line at a time.
"""

import dataclasses
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
    counters: dict[str, int] = {}


def work(address: str, key_file: str) -> None:
    """Serves one session after another, for ever."""
    listener = ControlListener(address, load_key_file(key_file), Ping, NAME, peer_info())
    print(listener.address, flush=True)
    while True:
        session = listener.accept(timeout_ms=1000)
        if session is None:
            continue
        try:
            while True:
                if (message := session.receive(timeout_ms=1000)) is not None:
                    session.send(Pong(message.number, dataclasses.asdict(listener.counters)))
        except SessionEnded as ended:
            session.close(str(ended))


def command(address: str, key_file: str) -> None:
    """Opens a session and waits for its end."""
    link = ControlLink(address, load_key_file(key_file), Pong, NAME, peer_info())
    link.open(60, lambda text: print(text, file=sys.stderr))
    print("open", flush=True)
    try:
        while True:
            link.receive(timeout_ms=1000)
    except WorkerError as error:
        print(error, flush=True)
    link.close()


if __name__ == "__main__":
    {"worker": work, "engine": command}[sys.argv[1]](*sys.argv[2:])
