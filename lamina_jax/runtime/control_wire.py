"""What travels between an engine and a worker on another host: who they are, and how a message is packed.

A message is a header frame (msgpack: session, sequence number) and a body, msgpack too, in frames of at most
`FRAME_BYTES`. So ZeroMQ can be told to hang up on anybody who sends a larger frame, before it has memory for one.
"""

import ipaddress
import os
import re
import socket
import sys
from collections.abc import Buffer, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

PROTOCOL: Final = 2
"""Number of the protocol: messages of control connections and channels. Ends with different numbers do not talk."""

FRAME_BYTES: Final = 256 << 10
MAX_MESSAGE_BYTES: Final = 64 << 20
"""Largest message. Block tables of 1024 sequences of 128k tokens take 32 MiB."""

SESSION_BYTES: Final = 16

_Text = Annotated[str, msgspec.Meta(max_length=256)]
_Reason = Annotated[str, msgspec.Meta(max_length=4096)]
_MUST_AGREE: Final = {
    "protocol": "protocol",
    "version": "lamina_jax",
    "jax": "JAX",
    "byte_order": "byte order",
}


class PeerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a process tells of itself when a session opens."""

    host: _Text
    pid: int
    version: _Text
    """Of lamina_jax."""
    protocol: int
    jax: _Text
    """Version of JAX."""
    byte_order: _Text
    """"little" or "big"."""
    boot_id: _Text
    """Of the running kernel, which tells hosts apart."""
    pid_namespace: _Text
    uid: int
    rdma: _Text | None = None
    """A description of a usable RDMA port, or None."""
    rdma_problem: _Reason = ""
    """Why there is no usable RDMA port, if there is none."""

    def __str__(self) -> str:
        return f"{self.host} (pid {self.pid})"


def peer_info(rdma: str | None = None, rdma_problem: str = "") -> PeerInfo:
    """That of this process."""
    return PeerInfo(
        host=socket.gethostname(),
        pid=os.getpid(),
        version=version("lamina_jax"),
        protocol=PROTOCOL,
        jax=version("jax"),
        byte_order=sys.byteorder,
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        pid_namespace=os.readlink("/proc/self/ns/pid"),
        uid=os.getuid(),
        rdma=rdma,
        rdma_problem=rdma_problem,
    )


def same_host(a: PeerInfo, b: PeerInfo) -> bool:
    """Whether two processes can share memory: one kernel, one user, and each sees the other's process id."""
    return (a.boot_id, a.pid_namespace, a.uid) == (b.boot_id, b.pid_namespace, b.uid)


def disagreement(engine: PeerInfo, worker: PeerInfo) -> str | None:
    """What keeps two processes from working together, or None."""
    different = [field for field in _MUST_AGREE if getattr(engine, field) != getattr(worker, field)]
    if not different:
        return None
    theirs, ours = (", ".join(f"{_MUST_AGREE[f]} {getattr(peer, f)}" for f in different) for peer in (engine, worker))
    return f"the engine on {engine} has {theirs}, the worker on {worker} has {ours}"


class Open(msgspec.Struct, tag=True):
    """Engine: I want a session. The header's session is a number of this request, which the answer repeats."""

    peer: PeerInfo


class Opened(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Worker: you have one."""

    session: Annotated[bytes, msgspec.Meta(min_length=SESSION_BYTES, max_length=SESSION_BYTES)]
    peer: PeerInfo


class Refused(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Worker: you cannot have one."""

    reason: _Reason
    final: bool
    """Whether it makes no sense to ask again."""


class Beat(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Either: I am alive."""


class Close(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Either: the session is over."""

    reason: _Reason


class Bye(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Engine: I end this connection, so there is nothing wrong if it ends. Of no session."""


FromEngine = Open | Beat | Close | Bye
ToEngine = Opened | Refused | Beat | Close


class _Header(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    session: Annotated[bytes, msgspec.Meta(min_length=SESSION_BYTES, max_length=SESSION_BYTES)]
    sequence: Annotated[int, msgspec.Meta(ge=0)]


class OversizeError(ValueError):
    """A message, or a frame of it, is larger than any that is sent."""


_HEADERS: Final = msgspec.msgpack.Decoder(_Header)


def encode(message: Any) -> bytes:
    """The body of a message. Raises ValueError if it is above `MAX_MESSAGE_BYTES`."""
    body = msgspec.msgpack.encode(message)
    if len(body) > MAX_MESSAGE_BYTES:
        raise ValueError(
            f"{type(message).__name__} takes {len(body)} bytes, and a control message at most {MAX_MESSAGE_BYTES}"
        )
    return body


def pack(session: bytes, sequence: int, body: bytes) -> list[bytes]:
    """The frames of a message, whose body `encode` made."""
    parts = [body[start : start + FRAME_BYTES] for start in range(0, len(body), FRAME_BYTES)]
    return [msgspec.msgpack.encode(_Header(session, sequence)), *parts]


def unpack(frames: Sequence[Buffer], decoder: msgspec.msgpack.Decoder) -> tuple[bytes, int, Any]:
    """Session, sequence number and message of some frames.

    Raises:
        OversizeError: they are larger than any that `pack` makes.
        ValueError: they are no message.
    """
    views = [memoryview(frame) for frame in frames]
    if sum(map(len, views)) > MAX_MESSAGE_BYTES + FRAME_BYTES or any(len(view) > FRAME_BYTES for view in views):
        raise OversizeError(f"{sum(map(len, views))} bytes in {len(views)} frames")
    if not views:
        raise ValueError("no frames")
    # msgspec's own error for what does not decode is a ValueError; one for text that is not UTF-8 is, too.
    header = _HEADERS.decode(views[0])
    return header.session, header.sequence, decoder.decode(b"".join(views[1:]))


def require_address(address: str, has_key: bool) -> tuple[str, int]:
    """Host and port of tcp://HOST:PORT. Raises ValueError for anything else, and for a host that is not loopback if
    there is no cluster key."""
    match = re.fullmatch(r"tcp://(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/\s]+)):(\d{1,5})", address)
    if match is None or int(match[3]) > 65535:
        raise ValueError(f"expected an address like tcp://10.0.0.2:7501 or tcp://[fd00::2]:7501, got {address!r}")
    host = match[1] or match[2]
    if not has_key and not _is_loopback(host):
        raise ValueError(
            f"{address} is not a loopback address, so it takes a cluster key: make one with "
            "scripts/make_cluster_key.py and give it to the engine and all workers"
        )
    return host, int(match[3])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
