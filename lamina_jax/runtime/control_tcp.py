"""The control connection between hosts: sessions of one engine with one worker over ZeroMQ.

A worker listens (`ControlListener`), an engine has a `ControlLink` for each worker. Whoever knows the cluster key may
open a session; a worker has one at a time. Each end has a thread that owns its sockets, so a session stays alive while
the program compiles or waits for a device.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Final

import msgspec

from lamina_jax.runtime.cluster_key import ClusterKey

PROTOCOL: Final = 1
"""Number of the protocol: messages and their meaning. Ends with different numbers do not talk."""

BEAT_S: Final = 0.5
"""Seconds between signs of life."""

SILENCE_S: Final = 5.0
"""Seconds without a sign of life after which a session is over."""

MAX_MESSAGE_BYTES: Final = 64 << 20
"""Largest message: block tables of 2048 sequences of 128k tokens."""


class PeerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a process tells of itself when a session opens."""

    host: str
    pid: int
    version: str
    """Of lamina_jax."""
    protocol: int
    jax: str
    """Version of JAX."""
    byte_order: str
    """"little" or "big"."""
    boot_id: str
    """Of the running kernel, which tells hosts apart."""
    pid_namespace: str
    uid: int
    rdma: str | None = None
    """A description of a usable RDMA port, or None."""
    rdma_problem: str = ""
    """Why there is no usable RDMA port, if there is none."""


def peer_info(rdma: str | None = None, rdma_problem: str = "") -> PeerInfo:
    """That of this process."""
    raise NotImplementedError


def same_host(a: PeerInfo, b: PeerInfo) -> bool:
    """Whether two processes can share memory: one kernel, one user, and each sees the other's process id."""
    raise NotImplementedError


@dataclasses.dataclass(kw_only=True)
class Counters:
    """What came to a listener, from its start on."""

    connections: int = 0
    """TCP connections accepted."""
    admitted: int = 0
    """Of these, those that finished the handshake, which takes the cluster key if there is one."""
    handshakes_failed: int = 0
    """Of these, those that did not."""
    opened: int = 0
    """Sessions opened."""
    refused_busy: int = 0
    """Sessions refused because there was one already."""
    refused_mismatch: int = 0
    """Sessions refused to an engine of another version, protocol or byte order."""
    malformed: int = 0
    """Messages that do not decode."""
    oversize: int = 0
    """Messages larger than `MAX_MESSAGE_BYTES`."""
    replayed: int = 0
    """Messages of the session with a sequence number other than the next, or over another connection."""
    unknown_session: int = 0
    """Messages of no session of now."""


class SessionEnded(Exception):
    """The engine closed the session, is silent, or its connection is lost; the message says which."""


class Session:
    """An engine's session with this worker, which the worker ends with `close`, also when `receive` said it is over."""

    peer: PeerInfo

    def send(self, message: Any) -> None:
        """Queues a message for the engine. Raises SessionEnded; ValueError if it is above `MAX_MESSAGE_BYTES`."""
        raise NotImplementedError

    def receive(self, timeout_ms: int) -> Any | None:
        """The next message, or None if there is none within `timeout_ms`. Raises SessionEnded once all that came
        before the end is received."""
        raise NotImplementedError

    def fileno(self) -> int:
        """A file descriptor that is readable while `receive` has something to return or to raise."""
        raise NotImplementedError

    def close(self, reason: str) -> None:
        """Ends the session; the engine is told why. Only then may another engine open one. May be called twice."""
        raise NotImplementedError

    def refuse(self, reason: str) -> None:
        """As `close`, for a message that decodes but makes no sense: counts it as malformed."""
        raise NotImplementedError


class ControlListener:
    """A worker's end: serves one session at a time, and answers others that the worker is busy, and with whom."""

    address: str
    """tcp://HOST:PORT, with the port that was bound."""

    def __init__(self, address: str, key: ClusterKey | None, incoming: Any, name: str, info: PeerInfo) -> None:
        """Args:
        address: tcp://HOST:PORT; port 0 takes a free one.
        key: None is allowed only on loopback addresses.
        incoming: the type of the engine's messages, a union of tagged msgspec structs.
        name: of this worker in errors, e.g. "attention worker 1".
        info: `peer_info` of this process.

        Raises:
            ValueError: the address is malformed, or needs a key.
            OSError: the address cannot be bound.
        """
        raise NotImplementedError

    @property
    def counters(self) -> Counters:
        """A copy of the counters."""
        raise NotImplementedError

    def accept(self, timeout_ms: int) -> Session | None:
        """The session that an engine has opened, or None if none does within `timeout_ms`."""
        raise NotImplementedError

    def close(self, reason: str = "the worker ends") -> None:
        """Ends the session, if there is one, and frees the address. May be called twice."""
        raise NotImplementedError


class ControlLink:
    """An engine's end of the session with one worker. Every error names the worker and its address."""

    def __init__(self, address: str, key: ClusterKey | None, incoming: Any, name: str, info: PeerInfo) -> None:
        """Args: as for `ControlListener`; `name` is the worker's, `incoming` the type of its messages. Raises ValueError
        likewise."""
        raise NotImplementedError

    def open(self, timeout_s: float, on_waiting: Callable[[str], None]) -> PeerInfo:
        """Waits for the worker, however late it starts, and opens a session.

        Args:
            timeout_s: how long to wait.
            on_waiting: called about every 5 s with what is waited for.

        Raises:
            WorkerError: the worker does not come, refuses the key or stays busy for `timeout_s`, or at once if it is of
                another version, protocol or byte order.
        """
        raise NotImplementedError

    def send(self, message: Any) -> None:
        """Queues a message. Raises WorkerError if the session is over; ValueError if it is above
        `MAX_MESSAGE_BYTES`."""
        raise NotImplementedError

    def receive(self, timeout_ms: int) -> Any | None:
        """The next message, or None if there is none within `timeout_ms`. Raises WorkerError if the session is over
        and all that came before is received."""
        raise NotImplementedError

    def fileno(self) -> int:
        """A file descriptor that is readable while `receive` has something to return or to raise, to wait for several
        links at once."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises WorkerError if the session is over: ended by the worker, silent for `SILENCE_S`, or disconnected."""
        raise NotImplementedError

    def close(self, reason: str = "the engine closed it") -> None:
        """Ends the session and frees what it held. May be called twice."""
        raise NotImplementedError
