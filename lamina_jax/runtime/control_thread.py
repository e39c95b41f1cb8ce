"""What both ends of a control connection share: sessions as an end keeps them, and the thread that owns its sockets."""

import contextlib
import dataclasses
import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import zmq
from absl import logging
from zmq.utils.monitor import recv_monitor_message

from lamina_jax.runtime import control_wire as wire
from lamina_jax.runtime.cluster_key import ClusterKey
from lamina_jax.runtime.control_wire import PeerInfo

BEAT_S: Final = 0.5
"""Seconds between signs of life."""

SILENCE_S: Final = 5.0
"""Seconds without a sign of life after which a session is over."""

_LOG_EVERY_S: Final = 10.0
_LINGER_MS: Final = 500
_HANDSHAKE_MS: Final = 5000
# ZeroMQ's own signs of life end connections whose other host is gone. Later than sessions, which say more.
_DEAD_MS: Final = int(2 * SILENCE_S * 1000)
# Messages. Steps are told one ahead, so an end that has left so many lie does not come back to them.
_QUEUED: Final = 256
_UNREAD: Final = 256
_AT_A_TIME: Final = 100
_TURN_MS: Final = int(BEAT_S * 1000 / 2)
HANDSHAKE_FAILED: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_EVENTS: Final = (
    zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | HANDSHAKE_FAILED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
)


@dataclasses.dataclass(kw_only=True)
class Counters:
    """What came, from the start on. A connection that has ended is in one of the three counters that follow it."""

    connections: int = 0
    """TCP connections accepted."""
    handshakes_failed: int = 0
    """Connections that did not finish the handshake: another key or none, another protocol, nothing within 5 s."""
    cut_off: int = 0
    """Connections that ended without a word: ZeroMQ hung up on a frame above its limit or on another protocol, or the
    engine was killed."""
    left: int = 0
    """Connections that an engine ended."""
    opened: int = 0
    """Sessions opened."""
    refused_busy: int = 0
    """Requests for a session while there was one, or no file descriptor for one."""
    refused_mismatch: int = 0
    """Requests of an engine of another version, protocol or byte order."""
    malformed: int = 0
    """Messages that do not decode, or that the program refused."""
    oversize: int = 0
    """Messages above `MAX_MESSAGE_BYTES`, or in frames that no engine sends."""
    replayed: int = 0
    """Messages of the session with another sequence number than the next, or over another connection."""
    unknown_session: int = 0
    """Messages of no session of now, also those that were under way when it ended."""

    def __str__(self) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in dataclasses.asdict(self).items())


class SessionEnded(Exception):  # noqa: N818 - not an error of this end
    """The engine closed the session, is silent, or its connection is lost; the message says which."""


class Inbox:
    """Items for the program and at last the end, with a file descriptor that is readable while there is either."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self.ended: str | None = None
        self.descriptor = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        weakref.finalize(self, os.close, self.descriptor)

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Any) -> None:
        self._items.append(item)
        os.eventfd_write(self.descriptor, 1)

    def end(self, reason: str) -> None:
        if self.ended is None:
            self.ended = reason
            os.eventfd_write(self.descriptor, 1)

    def get(self, timeout_ms: int) -> Any | None:
        """The next item, or None within the time. Raises SessionEnded after the last."""
        poller = select.poll()
        poller.register(self.descriptor, select.POLLIN)
        try:
            if not poller.poll(timeout_ms):
                return None
            os.eventfd_read(self.descriptor)
        except BlockingIOError:
            return None
        if self._items:
            return self._items.popleft()
        os.eventfd_write(self.descriptor, 1)
        raise SessionEnded(self.ended)


class Conversation:
    """A session as either end keeps it. All but `inbox` is the control thread's."""

    def __init__(self, session: bytes, peer: PeerInfo, transmit: Callable[[list[bytes]], object]) -> None:
        self.session = session
        self.peer = peer
        self.inbox = Inbox()
        self._transmit = transmit
        self._sent = self._expected = 0
        self._heard = time.monotonic()
        self._next_beat = 0.0

    def say(self, body: bytes) -> None:
        """Sends the next message, or ends the session if that cannot be."""
        if self.inbox.ended is not None:
            return
        try:
            self._transmit(wire.pack(self.session, self._sent, body))
        except zmq.Again:
            self.inbox.end(f"it does not take messages; {_QUEUED} wait")
        except zmq.ZMQError:
            self.inbox.end("the connection is lost")
        self._sent += 1

    def hear(self, sequence: int, message: Any) -> bool:
        """Takes a message, unless it is not the next one."""
        if sequence != self._expected:
            return False
        self._expected += 1
        self._heard = time.monotonic()
        if isinstance(message, wire.Close):
            self.inbox.end(message.reason)
        elif len(self.inbox) >= _UNREAD:
            self.close(f"{_UNREAD} messages wait unread")
        elif not isinstance(message, wire.Beat):
            self.inbox.put(message)
        return True

    def tick(self, now: float) -> None:
        """Gives a sign of life when it is time, and ends the session when the other end has given none."""
        if now - self._heard > SILENCE_S:
            self.close(f"no sign of life for {SILENCE_S:.0f} s")
        elif now >= self._next_beat:
            self._next_beat = now + BEAT_S
            self.say(wire.encode(wire.Beat()))

    def close(self, reason: str) -> None:
        """Tells the other end that the session is over, if it is not, and ends it."""
        self.say(wire.encode(wire.Close(reason[:4096])))
        self.inbox.end(reason)


class Arrival(NamedTuple):
    """A message and where it comes from."""

    identity: bytes
    """Of the connection, as a ROUTER names it."""
    descriptor: int
    """Of the connection's TCP socket, which the monitor names."""
    session: bytes
    sequence: int
    message: Any


class ControlThread:
    """A thread that owns ZeroMQ sockets and all state that depends on them; other threads hand it calls to make."""

    def __init__(self, key: ClusterKey | None, incoming: Any, name: str, info: PeerInfo) -> None:
        self._key = key
        self._name = name
        self._info = info
        self._decoder = msgspec.msgpack.Decoder(incoming)
        self._counters = Counters()
        self._next_log: dict[str, float] = {}
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._calls: deque[Callable[[], object]] = deque()
        self._call_lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller.register(self._wake, zmq.POLLIN)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"control of {name}", daemon=True)

    @property
    def counters(self) -> Counters:
        """A copy of what was counted."""
        return dataclasses.replace(self._counters)

    def _post(self, call: Callable[[], object]) -> None:
        """Has the thread make a call; forgotten if it has ended."""
        with self._call_lock:
            if self._wake >= 0:
                self._calls.append(call)
                os.eventfd_write(self._wake, 1)

    def _stop(self) -> None:
        """Ends the thread after the calls made before, and frees all sockets. May be called twice."""
        self._post(lambda: setattr(self, "_stopping", True))
        if self._thread.ident is not None:
            self._thread.join()
        with self._call_lock:
            if self._wake >= 0:
                os.close(self._wake)
                self._wake = -1
        self._context.destroy(linger=_LINGER_MS)

    def _socket(self, kind: int, host: str) -> tuple[zmq.Socket, zmq.Socket]:
        """A socket with the limits of all, and its monitor."""
        made = self._context.socket(kind)
        made.linger = _LINGER_MS
        made.ipv6 = ":" in host
        made.sndhwm = made.rcvhwm = _QUEUED
        # A frame of the largest size, what CURVE adds to it, and some that `unpack` sees and counts.
        made.maxmsgsize = 2 * wire.FRAME_BYTES
        made.handshake_ivl = _HANDSHAKE_MS
        made.heartbeat_ivl = 1000
        made.heartbeat_timeout = made.heartbeat_ttl = _DEAD_MS
        if self._key is not None:
            made.curve_publickey, made.curve_secretkey = self._key.public, self._key.secret
        monitor = made.get_monitor_socket(_EVENTS)
        for each in (made, monitor):
            self._poller.register(each, zmq.POLLIN)
        return made, monitor

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn(time.monotonic())
                self._poller.poll(_TURN_MS)
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
                while self._calls:
                    self._calls.popleft()()
        except Exception as error:
            logging.exception("%s: the control thread failed", self._name)
            self._fail(f"its control thread failed: {error!r}")
            self._context.destroy(linger=0)

    def _turn(self, now: float) -> None:
        """Handles what has come and what is due. Never waits."""
        raise NotImplementedError

    def _fail(self, reason: str) -> None:
        """Ends the session, if there is one."""
        raise NotImplementedError

    def _receive(self, source: zmq.Socket) -> Iterator[Arrival]:
        """The messages that have come; what is none is counted."""
        for _ in range(_AT_A_TIME):
            try:
                frames = source.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            identity = frames.pop(0).bytes if source.type == zmq.ROUTER else b""
            try:
                unpacked = wire.unpack([frame.buffer for frame in frames], self._decoder)
                # Of frames in ZeroMQ's protocols before 3.0, which no end speaks, the socket is not known.
                arrival = Arrival(identity, int(frames[0].get(zmq.SRCFD)), *unpacked)
            except wire.OversizeError as error:
                self._count("oversize", f"message from {_address(frames)}: {error}")
            except (ValueError, RecursionError, zmq.ZMQError) as error:
                self._count("malformed", f"message from {_address(frames)}: {error}")
            else:
                yield arrival

    def _count(self, kind: str, text: str = "") -> None:
        """Counts, and logs a line with `text` unless there was one of that kind lately."""
        count = getattr(self._counters, kind) + 1
        setattr(self._counters, kind, count)
        now = time.monotonic()
        if text and now >= self._next_log.get(kind, 0.0):
            self._next_log[kind] = now + _LOG_EVERY_S
            # What strangers say may hold anything, line feeds too.
            logging.warning("%s: %s %s (%d so far)", self._name, kind.replace("_", " "), ascii(text)[1:-1], count)


def connection_events(monitor: zmq.Socket) -> list[tuple[int, int]]:
    """What has happened to connections: events and their values."""
    events = []
    while len(events) < _AT_A_TIME and monitor.poll(0):
        event = recv_monitor_message(monitor)
        events.append((int(event["event"]), int(event["value"])))
    return events


def _address(frames: Sequence[zmq.Frame]) -> str:
    try:
        return str(frames[-1].get("Peer-Address"))
    except (IndexError, zmq.ZMQError):
        return "an unknown address"
