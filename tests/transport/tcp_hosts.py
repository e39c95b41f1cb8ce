"""TCP channels between two hosts: this process and its peer are in network namespaces of their own, joined by a link.

Run by test_tcp.py in fresh namespaces, so that the link, which goes down here, is nobody else's.
"""

import contextlib
import re
import subprocess
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from channel_peer import LIMIT_S, Mail, Peer, create, ping, recv_all, running_peer, send_all

from lamina_jax.transport import Channel, Role

OURS, THEIRS = "10.11.12.1", "10.11.12.2"
NOTHING_IN_TIME = 60.0  # seconds; a lost link has to be noticed long before


def link(state: str) -> None:
    subprocess.run(["ip", "link", "set", "here", state], check=True)


def join(peer: Peer) -> None:
    """Gives the peer a host of its own and a link to it."""
    peer.do("move_to_host", "hostb")
    subprocess.run(
        ["ip", "link", "add", "here", "type", "veth", "peer", "name", "there", "netns", str(peer.pid)], check=True
    )
    subprocess.run(["ip", "address", "add", f"{OURS}/24", "dev", "here"], check=True)
    link("up")
    peer.do("run", ["ip", "address", "add", f"{THEIRS}/24", "dev", "there"])
    peer.do("run", ["ip", "link", "set", "there", "up"])


@contextlib.contextmanager
def channel(peer: Peer, role: Role, **options) -> Iterator[tuple[Channel, int]]:
    options = {"num_slots": 2, "slot_bytes": 1 << 20, "timeout_s": NOTHING_IN_TIME} | options
    with create("tcp", role=role, peer="attention worker 1", messages=[], **options) as mine:
        yield mine, peer.join_to(mine, host=THEIRS, timeout_s=NOTHING_IN_TIME)


def require_lost(what: str, operation: Callable[[], object]) -> None:
    """The operation has to fail with an error that names host, process and cause."""
    began = time.monotonic()
    text = ""
    try:
        operation()
    except (jax.errors.JaxRuntimeError, AssertionError) as error:
        text = str(error)
    found = re.search(r"(attention worker 1|the test) \(pid \d+ on .+\) failed: the connection was lost: (.*)", text)
    if not found:
        raise SystemExit(f"{what} through a link that is down: {text or 'no error'}")
    print(f"{what}: {found[2]}, noticed after {time.monotonic() - began:.1f} s")


def check_traffic(peer: Peer) -> None:
    mail = Mail(shapes=((1 << 18,),))
    with channel(peer, "writer") as (there, theirs), channel(peer, "reader") as (back, other):
        peer.start("echo", theirs, other, mail, 20)
        (got,) = ping(there, back, mail, 20)
        peer.result()
        np.testing.assert_array_equal(got[-1], mail.contents()[0] + 19)
        assert there.peer_pid is None


def check_idle(peer: Peer) -> None:
    """Nothing is on the way; both ends wait for the other."""
    with channel(peer, "reader") as (back, theirs), channel(peer, "writer") as (_, other):
        peer.start("recv", other, [[Mail()]], [0])
        link("down")
        require_lost("recv", lambda: recv_all([back], [Mail()]))
        require_lost("recv of the peer", peer.result)
        link("up")
        peer.do("close", theirs)


def check_under_way(peer: Peer) -> None:
    """The link goes down before what the writer sends."""
    with channel(peer, "writer") as (there, theirs):
        link("down")
        require_lost("send", lambda: send_all([there], [Mail(layer=layer) for layer in range(3)]))
        link("up")
        peer.do("close", theirs)


def check_interruption(peer: Peer) -> None:
    """A link that comes back soon is no failure."""
    with channel(peer, "reader") as (back, theirs):
        link("down")
        peer.do("send", theirs, [[Mail()]], [0])
        link("up")
        recv_all([back], [Mail()])
        peer.do("close", theirs)


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    with running_peer("tcp-test-other-host") as peer:
        join(peer)
        for check in (check_traffic, check_interruption, check_idle, check_under_way):
            check(peer)
            print(check.__name__, "good", flush=True)
    assert LIMIT_S >= NOTHING_IN_TIME


if __name__ == "__main__":
    main()
