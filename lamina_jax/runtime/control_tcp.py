"""The control connection between hosts: sessions of one engine with one worker over ZeroMQ.

A worker listens (`ControlListener`), an engine has a `ControlLink` for each worker. Whoever has the cluster key may
open a session; a worker has one at a time. Each end has a thread that owns its sockets, so a session stays alive while
the program compiles or waits for a device.

A session's number is chosen by the worker, the request for it is numbered by the engine, and messages count from 0 in
each direction. So nothing that was recorded means anything in another session, or again in the same. What a listener
does not understand or expect gets no answer: it is counted and logged, and changes nothing.
"""

import contextlib
import dataclasses
import os
import secrets
import select
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import zmq
from absl import logging
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from lamina_jax.runtime import control_wire as wire
from lamina_jax.runtime.cluster_key import ClusterKey
from lamina_jax.runtime.control_wire import MAX_MESSAGE_BYTES, PROTOCOL, PeerInfo, peer_info, same_host
from lamina_jax.runtime.errors import WorkerError

__all__ = [
    "MAX_MESSAGE_BYTES",
    "PROTOCOL",
    "SILENCE_S",
    "ControlLink",
    "ControlListener",
    "Counters",
    "PeerInfo",
    "Session",
    "SessionEnded",
    "peer_info",
    "same_host",
]

BEAT_S: Final = 0.5
"""Seconds between signs of life."""

SILENCE_S: Final = 5.0
"""Seconds without a sign of life after which a session is over."""

_RETRY_S: Final = 0.5
_TELL_S: Final = 5.0
_LOG_EVERY_S: Final = 10.0
_LINGER_MS: Final = 500
_HANDSHAKE_MS: Final = 5000
# ZeroMQ's own signs of life end connections whose other host is gone. Later than sessions, which say more.
_DEAD_MS: Final = int(2 * SILENCE_S * 1000)
_QUEUED: Final = 256
_UNREAD: Final = 256
_AT_A_TIME: Final = 100
_TURN_MS: Final = int(BEAT_S * 1000 / 2)
_ZAP: Final = "inproc://zeromq.zap.01"
_FAILED: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_EVENTS: Final = (
    zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | _FAILED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
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
    """Requests for a session while there was one."""
    refused_mismatch: int = 0
    """Requests of an engine of another version, protocol or byte order."""
    malformed: int = 0
    """Messages that do not decode, or that the program refused."""
    oversize: int = 0
    """Messages above `MAX_MESSAGE_BYTES`, or in frames that no engine sends."""
    replayed: int = 0
    """Messages of the session with another sequence number than the next, or over another connection."""
    unknown_session: int = 0
    """Messages of no session of now."""

    def __str__(self) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in dataclasses.asdict(self).items())


class SessionEnded(Exception):  # noqa: N818 - not an error of this process
    """The engine closed the session, is silent, or its connection is lost; the message says which."""


class _Inbox:
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


class _Conversation:
    """A session as either end keeps it. All but `inbox` is the control thread's."""

    def __init__(self, session: bytes, peer: PeerInfo, transmit: Callable[[list[bytes]], object]) -> None:
        self.session = session
        self.peer = peer
        self.inbox = _Inbox()
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
            self.inbox.end(f"{_QUEUED} messages wait that it does not take")
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


class _Arrival(NamedTuple):
    """A message and where it comes from."""

    identity: bytes
    """Of the connection, as a ROUTER names it."""
    descriptor: int
    """Of the connection's TCP socket, which the monitor names."""
    session: bytes
    sequence: int
    message: Any


class _ControlThread:
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

    def _receive(self, source: zmq.Socket) -> Iterator[_Arrival]:
        """The messages that have come; what is none is counted."""
        for _ in range(_AT_A_TIME):
            try:
                frames = source.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            identity = frames.pop(0).bytes if source.type == zmq.ROUTER else b""
            try:
                message = wire.unpack([frame.buffer for frame in frames], self._decoder)
            except wire.OversizeError as error:
                self._count("oversize", f"message from {_address(frames)}: {error}")
            except ValueError as error:
                self._count("malformed", f"message from {_address(frames)}: {error}")
            else:
                yield _Arrival(identity, int(frames[0].get(zmq.SRCFD)), *message)

    def _count(self, kind: str, text: str = "") -> None:
        """Counts, and logs a line with `text` unless there was one of that kind lately."""
        count = getattr(self._counters, kind) + 1
        setattr(self._counters, kind, count)
        now = time.monotonic()
        if text and now >= self._next_log.get(kind, 0.0):
            self._next_log[kind] = now + _LOG_EVERY_S
            # What strangers say may hold anything, line feeds too.
            logging.warning("%s: %s %s (%d so far)", self._name, kind.replace("_", " "), ascii(text)[1:-1], count)


def _events(monitor: zmq.Socket) -> list[tuple[int, int]]:
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


class Session:
    """An engine's session with this worker. The worker ends it with `close`, also when `receive` said it is over.

    What decodes may still make no sense; that is for the worker to see, and to `refuse`.
    """

    def __init__(self, conversation: _Conversation, listener: "ControlListener") -> None:
        self.peer: PeerInfo = conversation.peer
        self._conversation = conversation
        self._listener = listener

    def send(self, message: Any) -> None:
        """Queues a message for the engine. Raises SessionEnded; ValueError if it is above `MAX_MESSAGE_BYTES`."""
        body = wire.encode(message)
        if (reason := self._conversation.inbox.ended) is not None:
            raise SessionEnded(self._over(reason))
        self._listener._post(lambda: self._conversation.say(body))

    def receive(self, timeout_ms: int) -> Any | None:
        """The next message, or None if there is none within `timeout_ms`. Raises SessionEnded once all that came
        before the end is received."""
        try:
            return self._conversation.inbox.get(timeout_ms)
        except SessionEnded as ended:
            raise SessionEnded(self._over(ended)) from None

    def fileno(self) -> int:
        """A file descriptor that is readable while `receive` has something to return or to raise."""
        return self._conversation.inbox.descriptor

    def close(self, reason: str) -> None:
        """Ends the session; the engine is told why. Only then may another engine open one. May be called twice."""
        self._listener._post(lambda: self._listener._release(self._conversation, reason))

    def refuse(self, reason: str) -> None:
        """As `close`, for a message that decodes but makes no sense: counts it as malformed."""
        self._listener._post(lambda: self._listener._count("malformed", f"message from {self.peer}: {reason}"))
        self.close(reason)

    def _over(self, reason: object) -> str:
        return f"the session with the engine on {self.peer} is over: {reason}"


class ControlListener(_ControlThread):
    """A worker's end: serves one session at a time, and answers others that the worker is busy, and with whom."""

    address: str
    """tcp://HOST:PORT, with the port that was bound."""

    def __init__(self, address: str, key: ClusterKey | None, incoming: Any, name: str, info: PeerInfo) -> None:
        """Args:
        address: tcp://HOST:PORT; port 0 takes a free one.
        key: None is allowed only on loopback addresses.
        incoming: the type of the engine's messages, a union of tagged msgspec structs.
        name: of this worker in the log, e.g. "attention worker 1".
        info: `peer_info` of this process.

        Raises:
            ValueError: the address is malformed, or needs a key.
            OSError: the address cannot be bound.
        """
        host, port = wire.require_address(address, key is not None)
        super().__init__(key, incoming | wire.FromEngine, name, info)
        self._current: _Conversation | None = None
        self._identity = b""
        self._confirmed = False
        self._leaving: set[int] = set()
        self._failing = 0
        self._accepted = _Inbox()
        try:
            self._bind(host, port)
        except (zmq.ZMQError, OSError) as error:
            self._stop()
            raise OSError(error.errno, f"{name} cannot listen on {address}: {error.strerror}") from None
        self.address = bytes(self._router.getsockopt(zmq.LAST_ENDPOINT)).decode().rstrip("\0")
        self._thread.start()

    def accept(self, timeout_ms: int) -> Session | None:
        """The session that an engine has opened, or None if none does within `timeout_ms`."""
        deadline = time.monotonic() + timeout_ms / 1000
        while True:
            try:
                session = self._accepted.get(max(0, int((deadline - time.monotonic()) * 1000)))
            except SessionEnded as ended:
                raise RuntimeError(f"{self._name} does not listen any more: {ended}") from None
            if session is None or session._conversation.inbox.ended is None:
                return session
            session.close("the worker had not started yet")

    def close(self, reason: str = "the worker ends") -> None:
        """Ends the session, if there is one, and frees the address. May be called twice."""
        self._post(lambda: self._fail(reason))
        self._stop()

    def _bind(self, host: str, port: int) -> None:
        self._zap = self._context.socket(zmq.REP)
        self._zap.bind(_ZAP)
        self._poller.register(self._zap, zmq.POLLIN)
        self._router, self._monitor = self._socket(zmq.ROUTER, host)
        # Without it, a message to an engine that is gone would be dropped in silence.
        self._router.router_mandatory = True
        if self._key is not None:
            self._router.curve_server = True
            self._router.zap_domain = b"lamina_jax"
            self._router.zap_enforce_domain = True
        address = socket.getaddrinfo(host, port, 0 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
        self._router.bind(f"tcp://[{address}]:{port}" if ":" in host else f"tcp://{address}:{port}")

    def _turn(self, now: float) -> None:
        self._authenticate()
        # Events are read before messages and handled after them: what an engine said comes before its leaving.
        events = _events(self._monitor)
        for arrival in self._receive(self._router):
            self._take(arrival)
        for event, value in events:
            self._see(event, value)
        if self._current is not None:
            self._current.tick(now)
            if self._current.inbox.ended is not None and not self._confirmed:
                self._current = None

    def _authenticate(self) -> None:
        """Admits who has the cluster key (ZeroMQ's authentication protocol, RFC 27)."""
        with contextlib.suppress(zmq.Again):
            while True:
                version, request, _, _, _, mechanism, *credentials = self._zap.recv_multipart(zmq.NOBLOCK)
                known = self._key is not None and credentials == [z85.decode(self._key.public)]
                status = [b"200", b"OK", b"cluster"] if mechanism == b"CURVE" and known else [b"400", b"no", b""]
                self._zap.send_multipart([version, request, *status, b""])

    def _see(self, event: int, value: int) -> None:
        if event == zmq.EVENT_ACCEPTED:
            self._count("connections")
        elif event & _FAILED:
            self._count("handshakes_failed", "with a client; does it have the same cluster key?")
            self._failing += 1
        elif event == zmq.EVENT_DISCONNECTED and self._failing > 0:
            self._failing -= 1  # each failure is followed by the end of its connection
        elif event == zmq.EVENT_DISCONNECTED and value in self._leaving:
            self._leaving.remove(value)
            self._count("left")
        elif event == zmq.EVENT_DISCONNECTED:
            self._count("cut_off", "connection")

    def _take(self, arrival: _Arrival) -> None:
        current, message = self._current, arrival.message
        if isinstance(message, wire.Open):
            self._answer(arrival.identity, arrival.session, message.peer)
        elif isinstance(message, wire.Bye) and arrival.descriptor not in self._leaving:
            self._leaving.add(arrival.descriptor)
        elif current is None or current.inbox.ended is not None or arrival.session != current.session:
            self._count("unknown_session", f"in {type(message).__name__}")
        elif arrival.identity != self._identity or not current.hear(arrival.sequence, message):
            self._count("replayed", f"{type(message).__name__} number {arrival.sequence}")
        elif not self._confirmed:
            # Only an engine of now knows the number, so this is no recording.
            self._confirmed = True
            self._accepted.put(Session(current, self))

    def _answer(self, identity: bytes, request: bytes, engine: PeerInfo) -> None:
        """Opens a session or says why not."""
        answer: Any
        if (problem := wire.disagreement(engine, self._info)) is not None:
            self._count("refused_mismatch", problem)
            answer = wire.Refused(problem, final=True)
        elif self._current is not None:
            self._count("refused_busy")
            answer = wire.Refused(f"busy with the engine on {self._current.peer}", final=False)
        else:
            self._count("opened")
            self._identity, self._confirmed = identity, False
            number = secrets.token_bytes(wire.SESSION_BYTES)
            self._current = _Conversation(number, engine, lambda frames: self._transmit(identity, frames))
            answer = wire.Opened(number, self._info)
        with contextlib.suppress(zmq.ZMQError):
            self._transmit(identity, wire.pack(request, 0, wire.encode(answer)))

    def _transmit(self, identity: bytes, frames: list[bytes]) -> None:
        self._router.send_multipart([identity, *frames], zmq.NOBLOCK)

    def _release(self, conversation: _Conversation, reason: str) -> None:
        conversation.close(reason)
        if self._current is conversation:
            self._current = None

    def _fail(self, reason: str) -> None:
        if self._current is not None:
            self._current.close(reason)
        self._accepted.end(reason)


class ControlLink(_ControlThread):
    """An engine's end of the session with one worker. Every error names the worker and its address."""

    def __init__(self, address: str, key: ClusterKey | None, incoming: Any, name: str, info: PeerInfo) -> None:
        """Args: as for `ControlListener`; `name` is the worker's, `incoming` the type of its messages.

        Raises:
            ValueError: the address is malformed, or needs a key.
        """
        self._host, port = wire.require_address(address, key is not None)
        if port == 0:
            raise ValueError(f"{name}: port 0 of {address} is no port to connect to")
        super().__init__(key, incoming | wire.ToEngine, f"{name} at {address}", info)
        self.address = address
        self._conversation: _Conversation | None = None
        self._refused: str | None = None
        self._state = "no answer yet"
        self._answered = threading.Event()
        self._dealer: zmq.Socket | None = None
        self._request = b""
        self._retry_at = 0.0
        self._ask_at: float | None = None

    def open(self, timeout_s: float, on_waiting: Callable[[str], None]) -> PeerInfo:
        """Waits for the worker, however late it starts, and opens a session.

        Args:
            timeout_s: how long to wait.
            on_waiting: called about every 5 s with what is waited for.

        Raises:
            WorkerError: the worker does not come, refuses the key or stays busy for `timeout_s`, or at once if it is of
                another version, protocol or byte order.
        """
        deadline = time.monotonic() + timeout_s
        self._thread.start()
        while not self._answered.wait(min(_TELL_S, max(0.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                raise WorkerError(f"Waited {timeout_s:.0f} s for {self._name}: {self._state}.")
            on_waiting(f"{self._name}: {self._state}")
        if self._conversation is None:
            raise WorkerError(f"{self._name} refused: {self._refused}.")
        return self._conversation.peer

    def send(self, message: Any) -> None:
        """Queues a message. Raises WorkerError if the session is over; ValueError if it is above
        `MAX_MESSAGE_BYTES`."""
        body = wire.encode(message)
        self.check()
        self._post(lambda: self._opened().say(body))

    def receive(self, timeout_ms: int) -> Any | None:
        """The next message, or None if there is none within `timeout_ms`. Raises WorkerError if the session is over
        and all that came before is received."""
        try:
            return self._opened().inbox.get(timeout_ms)
        except SessionEnded as ended:
            raise self._over(ended) from None

    def fileno(self) -> int:
        """A file descriptor that is readable while `receive` has something to return or to raise, to wait for several
        links at once."""
        return self._opened().inbox.descriptor

    def check(self) -> None:
        """Raises WorkerError if the session is over: ended by the worker, silent for `SILENCE_S`, or disconnected."""
        if (reason := self._opened().inbox.ended) is not None:
            raise self._over(reason)

    def close(self, reason: str = "the engine ended it") -> None:
        """Ends the session and frees what it held. May be called twice."""
        self._post(lambda: self._leave(reason))
        self._stop()

    def _opened(self) -> _Conversation:
        if self._conversation is None:
            raise RuntimeError(f"{self._name}: the session is not open; call open() first")
        return self._conversation

    def _over(self, reason: object) -> WorkerError:
        return WorkerError(f"{self._name}, on {self._opened().peer}: {reason}.")

    def _turn(self, now: float) -> None:
        if self._dealer is None:
            if now >= self._retry_at and self._conversation is None:
                self._connect()
            return
        events = _events(self._monitor)
        for arrival in self._receive(self._dealer):
            self._take(arrival)
        for event, _ in events:
            self._see(event, now)
        if self._conversation is not None:
            self._conversation.tick(now)
        elif self._ask_at is not None and now >= self._ask_at:
            self._ask()

    def _connect(self) -> None:
        self._dealer, self._monitor = self._socket(zmq.DEALER, self._host)
        # Nothing is queued for a connection that is not there.
        self._dealer.immediate = True
        self._dealer.reconnect_ivl = int(_RETRY_S * 1000)
        if self._key is not None:
            self._dealer.curve_serverkey = self._key.public
        self._dealer.connect(self.address)

    def _disconnect(self, now: float) -> None:
        """ZeroMQ does not connect again after some errors of a handshake, so whatever ends a connection, the next
        attempt has a socket of its own."""
        if self._dealer is not None:
            for each in (self._dealer, self._monitor):
                self._poller.unregister(each)
            self._dealer.disable_monitor()
            self._dealer.close()
            self._monitor.close()
        self._dealer, self._ask_at, self._retry_at = None, None, now + _RETRY_S

    def _see(self, event: int, now: float) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._state = "connected, no answer yet"
            self._ask_at = now
        elif event & _FAILED:
            self._state = "handshake refused: is it the same cluster key?"
        elif event == zmq.EVENT_CLOSED:
            self._state = "no answer yet"
        elif event == zmq.EVENT_DISCONNECTED:
            if self._conversation is not None:
                self._conversation.inbox.end("the connection is lost")
            self._disconnect(now)

    def _ask(self) -> None:
        assert self._dealer is not None
        self._ask_at = None
        self._request = secrets.token_bytes(wire.SESSION_BYTES)
        with contextlib.suppress(zmq.Again):
            self._dealer.send_multipart(wire.pack(self._request, 0, wire.encode(wire.Open(self._info))), zmq.NOBLOCK)

    def _take(self, arrival: _Arrival) -> None:
        current, message = self._conversation, arrival.message
        if isinstance(message, wire.Opened | wire.Refused) and current is None and arrival.session == self._request:
            self._settle(message)
        elif current is None or current.inbox.ended is not None or arrival.session != current.session:
            self._count("unknown_session", f"in {type(message).__name__}")
        elif not current.hear(arrival.sequence, message):
            self._count("replayed", f"{type(message).__name__} number {arrival.sequence}")

    def _settle(self, answer: wire.Opened | wire.Refused) -> None:
        self._request = b""
        if isinstance(answer, wire.Opened):
            dealer = self._dealer
            assert dealer is not None
            transmit = lambda frames: dealer.send_multipart(frames, zmq.NOBLOCK)  # noqa: E731
            self._conversation = _Conversation(answer.session, answer.peer, transmit)
            self._answered.set()
        elif answer.final:
            self._refused = answer.reason
            self._answered.set()
        else:
            self._state = f"refused: {answer.reason}"
            self._ask_at = time.monotonic() + _RETRY_S

    def _leave(self, reason: str) -> None:
        if self._conversation is not None:
            self._conversation.close(reason)
        if self._dealer is not None:
            with contextlib.suppress(zmq.Again):
                self._dealer.send_multipart(
                    wire.pack(bytes(wire.SESSION_BYTES), 0, wire.encode(wire.Bye())), zmq.NOBLOCK
                )

    def _fail(self, reason: str) -> None:
        if self._conversation is not None:
            self._conversation.inbox.end(reason)
        self._refused = reason
        self._answered.set()
