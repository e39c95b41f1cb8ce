"""Channels over TCP, between two processes that reach each other by a network: for hosts without RDMA."""

import contextlib
import errno
import os
import secrets
import socket
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from lamina_jax import _custom_calls
from lamina_jax.transport.base import (
    Channel,
    ChannelAddress,
    MessageSpec,
    Role,
    require_kind,
    require_wait,
    slot_room,
)
from lamina_jax.transport.cpu_calls import TARGETS

KIND = "tcp"
_SPIN_US = 0.0  # it is another thread that receives: polling for what it will have would keep it from the core
_CONNECT_S = 5.0  # the longest that the other end may take to accept, and to welcome


class _Creator(msgspec.Struct, frozen=True, kw_only=True):
    """What the location of an address holds, as JSON: who will connect, and how to know it."""

    host_name: str
    pid: int
    token: bytes


class _Acceptor(msgspec.Struct, frozen=True, kw_only=True):
    """What the location of an answer holds, as JSON: where to connect."""

    host_name: str
    pid: int
    host: str
    port: int


class TcpChannel(Channel):
    """A ring whose messages a thread at each end moves through a connection of its own.

    The end that attaches listens on a port of its own until the creator has connected and shown the random token that
    came with the address; it drops everyone else. Whoever sees the address can take the creator's place, and whoever
    sees the traffic can read it: send addresses over an encrypted connection, and use networks that you trust.
    """

    needs_answer = True

    def __init__(
        self,
        handle: _custom_calls.TcpHandle,
        address: ChannelAddress,
        *,
        role: Role,
        peer: str,
        device: int | None = None,
        answer: ChannelAddress | None = None,
    ):
        super().__init__(
            role=role,
            peer=peer,
            num_slots=address.num_slots,
            slot_bytes=address.slot_bytes,
            device=device,
            attached=answer is not None,
        )
        self._handle = handle
        self._address = address
        self._answer = answer
        self._peer_is_local = False

    @classmethod
    def create(
        cls,
        *,
        role: Role,
        peer: str,
        messages: Sequence[MessageSpec],
        num_slots: int = 8,
        slot_bytes: int | None = None,
        timeout_s: float = 60.0,
        spin_us: float = _SPIN_US,
        device: int | None = None,
    ) -> "TcpChannel":
        """Reserves the memory of this end; see `Channel.create`.

        Args:
            role: The end to take.
            peer: What errors call the other end.
            messages: Every message that will travel.
            num_slots: Messages in flight before a send waits.
            slot_bytes: Bytes of tensors per slot; None takes the largest of `messages`.
            timeout_s: Seconds that one send or recv waits at most.
            spin_us: Microseconds that a wait polls before it sleeps.
            device: `jax.Device.local_hardware_id` of the one CPU device whose programs use this end; None for any.
        """
        require_wait(timeout_s, spin_us)
        room = slot_room(messages, num_slots=num_slots, slot_bytes=slot_bytes)
        handle = _make_end(role, peer, num_slots, room, timeout_s, spin_us, device)
        me = _Creator(host_name=socket.gethostname(), pid=os.getpid(), token=secrets.token_bytes(32))
        address = ChannelAddress(
            kind=KIND, location=_located(me), num_slots=num_slots, slot_bytes=room, creator_role=role
        )
        return cls(handle, address, role=role, peer=peer, device=device)

    @classmethod
    def attach(
        cls,
        address: ChannelAddress,
        *,
        role: Role,
        peer: str,
        timeout_s: float = 60.0,
        spin_us: float = _SPIN_US,
        host: str = "127.0.0.1",
    ) -> "TcpChannel":
        """Takes the free end of the channel and waits, in a thread, for the creator to connect; see `Channel.attach`.

        Args:
            address: What the creator sent.
            role: The end to take.
            peer: What errors call the other end.
            timeout_s: Seconds that one send or recv waits at most.
            spin_us: Microseconds that a wait polls before it sleeps.
            host: The address of this host, of the network by which the creator reaches it. No other is listened on.
        """
        require_kind(address, KIND)
        require_wait(timeout_s, spin_us)
        creator = _parsed(address, _Creator, f"{peer}'s end of a tcp channel")
        if role == address.creator_role:
            raise ValueError(
                f"the {role} of the ring at {creator.host_name} is already taken: expected no {role}, got its creator, "
                f"process {creator.pid}"
            )
        handle = _make_end(role, peer, address.num_slots, address.slot_bytes, timeout_s, spin_us, None)
        with _listening(host) as listener:
            port = listener.getsockname()[1]
            handle.accept(listener.detach(), creator.token, creator.pid, _other(creator.host_name))
        me = _Acceptor(host_name=socket.gethostname(), pid=os.getpid(), host=host, port=port)
        answer = msgspec.structs.replace(address, location=_located(me))
        channel = cls(handle, address, role=role, peer=peer, answer=answer)
        channel._peer_is_local = not _other(creator.host_name)
        return channel

    @property
    def address(self) -> ChannelAddress:
        return self._address

    @property
    def answer(self) -> ChannelAddress | None:
        return self._answer

    def _connect(self, answer: ChannelAddress) -> None:
        there = _parsed(answer, _Acceptor, f"how to reach {self.peer}'s end of a tcp channel")
        own = _parsed(self._address, _Creator, "this end's address")
        connection = _connected(self.peer, there, own.token)
        self._handle.connect(connection.detach(), there.pid, _other(there.host_name))
        self._peer_is_local = not _other(there.host_name)

    @property
    def id(self) -> int:
        return self._handle.id

    @property
    def targets(self) -> dict[Literal["send", "recv"], str]:
        return TARGETS

    @property
    def peer_pid(self) -> int | None:
        return self._handle.peer_pid or None if self._peer_is_local else None

    @property
    def closed(self) -> bool:
        return self._handle.closed

    @property
    def failure(self) -> str | None:
        return self._handle.failure

    def abort(self) -> None:
        self._handle.abort()

    def close(self) -> None:
        self._handle.close()


def _make_end(
    role: Role, peer: str, num_slots: int, slot_bytes: int, timeout_s: float, spin_us: float, device: int | None
) -> _custom_calls.TcpHandle:
    return _custom_calls.TcpHandle.create(
        writer=role == "writer",
        peer=peer,
        num_slots=num_slots,
        slot_bytes=slot_bytes,
        timeout_s=timeout_s,
        spin_us=spin_us,
        device=_custom_calls.ANY_DEVICE if device is None else device,
    )


def _located(where: _Creator | _Acceptor) -> str:
    return msgspec.json.encode(where).decode()


def _parsed[Where: (_Creator, _Acceptor)](address: ChannelAddress, where: type[Where], what: str) -> Where:
    try:
        return msgspec.json.decode(address.location, type=where)
    except msgspec.DecodeError as error:
        # Without the location, which may hold the token.
        raise ValueError(f"expected {what}, got a location that does not say it: {error}") from None


def _other(host_name: str) -> str:
    """The name of a host, or nothing if it is this one."""
    return "" if host_name == socket.gethostname() else host_name


@contextlib.contextmanager
def _listening(host: str) -> Iterator[socket.socket]:
    try:
        family, _, _, _, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(where[:2], family=family, backlog=1)
    except OSError as error:
        raise OSError(
            error.errno, f"cannot listen on {host}, which has to be an address of this host: {error}"
        ) from error
    with listener:
        yield listener


def _connected(peer: str, there: _Acceptor, token: bytes) -> socket.socket:
    """A connection to the port that has taken the token."""
    name = f"{peer} (pid {there.pid} on {there.host_name}) at {there.host}, port {there.port}"
    try:
        connection = socket.create_connection((there.host, there.port), timeout=_CONNECT_S)
    except OSError as error:
        raise OSError(error.errno or errno.ETIMEDOUT, f"cannot connect to {name}: {error}") from error
    try:
        connection.sendall(_custom_calls.tcp_hello(token))
        welcome = _receive(connection, len(_custom_calls.TCP_WELCOME))
    except OSError as error:
        connection.close()
        raise OSError(error.errno or errno.ETIMEDOUT, f"no welcome came from {name}: {error}") from error
    if welcome != _custom_calls.TCP_WELCOME:
        connection.close()
        raise ConnectionRefusedError(
            errno.ECONNREFUSED,
            f"{name} did not take the token of this channel: expected a welcome, got {welcome!r}",
        )
    return connection


def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    """So many bytes, or fewer if there are no more."""
    received = b""
    while len(received) < num_bytes and (more := connection.recv(num_bytes - len(received))):
        received += more
    return received
