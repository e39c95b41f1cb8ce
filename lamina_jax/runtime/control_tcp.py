"""The control connection between hosts: sessions of one engine with one worker over ZeroMQ.

A worker listens (`ControlListener`), an engine has a `ControlLink` for each worker. Whoever has the cluster key may
open a session; a worker has one at a time. Each end has a thread that owns its sockets, so a session stays alive while
the program compiles or waits for a device.

A session's number is chosen by the worker, the request for it is numbered by the engine, and messages count from 0 in
each direction. So nothing that was recorded means anything in another session, or again in the same. What a listener
does not understand or expect gets no answer: it is counted and logged, and changes nothing.
"""

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import zmq
from zmq.utils import z85

from lamina_jax.runtime import control_wire as wire
from lamina_jax.runtime.cluster_key import ClusterKey
from lamina_jax.runtime.control_thread import (
    HANDSHAKE_FAILED,
    SILENCE_S,
    Arrival,
    ControlThread,
    Conversation,
    Counters,
    Inbox,
    SessionEnded,
    connection_events,
)
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

_RETRY_S: Final = 0.5
_TELL_S: Final = 5.0
_ZAP: Final = "inproc://zeromq.zap.01"
BUSY: Final = "busy with the engine on"
"""So begins why a worker refuses an engine while it serves another, whose end is worth waiting for."""


class Session:
    """An engine's session with this worker. The worker ends it with `close`, also when `receive` said it is over.

    What decodes may still make no sense; that is for the worker to see, and to `refuse`.
    """

    def __init__(self, conversation: Conversation, listener: "ControlListener") -> None:
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


class ControlListener(ControlThread):
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
        self._current: Conversation | None = None
        self._identity = b""
        self._confirmed = False
        self._leaving: set[int] = set()
        self._failing = 0
        self._accepted = Inbox()
        try:
            self._bind(host, port)
        except (zmq.ZMQError, OSError) as error:
            self._stop()
            raise OSError(error.errno, f"{name} cannot listen on {address}: {error.strerror}") from None
        self.address = bytes(self._router.getsockopt(zmq.LAST_ENDPOINT)).decode().rstrip("\0")
        self._thread.start()

    def accept(self, timeout_ms: int) -> Session | None:
        """The session that an engine has opened, or None if none does within `timeout_ms`. Raises RuntimeError if the
        listener is closed or its thread failed."""
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
        self._router.curve_server = self._key is not None
        # Also without a key: ZeroMQ then hangs up on its protocols before 3.0, which nearly any bytes are a message of.
        self._router.zap_domain = b"lamina_jax"
        self._router.zap_enforce_domain = True
        address = socket.getaddrinfo(host, port, 0 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
        self._router.bind(f"tcp://[{address}]:{port}" if ":" in host else f"tcp://{address}:{port}")

    def _turn(self, now: float) -> None:
        self._authenticate()
        # Events are read before messages and handled after them: what an engine said comes before its leaving.
        events = connection_events(self._monitor)
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
                expected = (b"NULL", []) if self._key is None else (b"CURVE", [z85.decode(self._key.public)])
                status = [b"200", b"OK", b""] if (mechanism, credentials) == expected else [b"400", b"no", b""]
                self._zap.send_multipart([version, request, *status, b""])

    def _see(self, event: int, value: int) -> None:
        if event == zmq.EVENT_ACCEPTED:
            self._count("connections")
        elif event & HANDSHAKE_FAILED:
            self._count("handshakes_failed", "with a client; does it have the same cluster key?")
            self._failing += 1
        elif event == zmq.EVENT_DISCONNECTED and self._failing > 0:
            self._failing -= 1  # each failure is followed by the end of its connection
        elif event == zmq.EVENT_DISCONNECTED and value in self._leaving:
            self._leaving.remove(value)
            self._count("left")
        elif event == zmq.EVENT_DISCONNECTED:
            self._count("cut_off", "connection")

    def _take(self, arrival: Arrival) -> None:
        current, message = self._current, arrival.message
        if isinstance(message, wire.Open):
            self._answer(arrival.identity, arrival.session, message.peer)
        elif isinstance(message, wire.Bye) and arrival.descriptor not in self._leaving:
            self._leaving.add(arrival.descriptor)
        elif current is None or current.inbox.ended is not None or arrival.session != current.session:
            self._count("unknown_session", "" if isinstance(message, wire.Beat) else f"in {type(message).__name__}")
        elif arrival.identity != self._identity or not current.hear(arrival.sequence, message):
            self._count("replayed", f"{type(message).__name__} number {arrival.sequence}")
        elif not self._confirmed:
            # Only an engine of now knows the number, so this is no recording.
            self._confirmed = True
            self._accepted.put(Session(current, self))

    def _answer(self, identity: bytes, request: bytes, engine: PeerInfo) -> None:
        """Opens a session or says why not."""
        if (problem := wire.disagreement(engine, self._info)) is not None:
            self._count("refused_mismatch", problem)
            answer = wire.Refused(problem, final=True)
        elif self._current is not None:
            self._count("refused_busy")
            answer = wire.Refused(f"{BUSY} {self._current.peer}", final=False)
        else:
            answer = self._open(identity, engine)
        with contextlib.suppress(zmq.ZMQError):
            self._transmit(identity, wire.pack(request, 0, wire.encode(answer)))

    def _open(self, identity: bytes, engine: PeerInfo) -> wire.Opened | wire.Refused:
        number = secrets.token_bytes(wire.SESSION_BYTES)
        try:
            self._current = Conversation(number, engine, lambda frames: self._transmit(identity, frames))
        except OSError as error:
            # Connections that say nothing take file descriptors for 5 s; enough of them take all.
            self._count("refused_busy", f"for want of a file descriptor: {error}")
            return wire.Refused(f"{error}", final=False)
        self._count("opened")
        self._identity, self._confirmed = identity, False
        return wire.Opened(number, self._info)

    def _transmit(self, identity: bytes, frames: list[bytes]) -> None:
        self._router.send_multipart([identity, *frames], zmq.NOBLOCK)

    def _release(self, conversation: Conversation, reason: str) -> None:
        conversation.close(reason)
        if self._current is conversation:
            self._current = None

    def _fail(self, reason: str) -> None:
        if self._current is not None:
            self._current.close(reason)
        self._accepted.end(reason)


class ControlLink(ControlThread):
    """An engine's end of one session with one worker; another session takes another link. Every error names the worker
    and its address."""

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
        self._conversation: Conversation | None = None
        self._state = "no answer yet"
        self._answered = threading.Event()
        self._dealer: zmq.Socket | None = None
        self._request = b""
        self._retry_at = 0.0
        self._ask_at: float | None = None

    def open(self, timeout_s: float, on_waiting: Callable[[str], None]) -> PeerInfo:
        """Waits for the worker, however late it starts, and opens a session. Called once, and `close` after it, also if
        it fails.

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
            raise WorkerError(f"{self._name}: {self._state}.")
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

    def _opened(self) -> Conversation:
        if self._conversation is None:
            raise RuntimeError(f"{self._name}: the session is not open; call open() first")
        return self._conversation

    def _over(self, reason: object) -> WorkerError:
        return WorkerError(f"{self._name}, on {self._opened().peer}: {str(reason).rstrip('.')}.")

    def _turn(self, now: float) -> None:
        if self._dealer is None:
            if now >= self._retry_at and self._conversation is None:
                self._connect()
            return
        events = connection_events(self._monitor)
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
        # Not ZMQ_IMMEDIATE: it drops what had come before a connection ended, such as why.
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
            self._dealer.close(linger=0)
            self._monitor.close(linger=0)
        self._dealer, self._ask_at, self._retry_at = None, None, now + _RETRY_S

    def _see(self, event: int, now: float) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._state = "connected, no answer yet"
            self._ask_at = now
        elif event & HANDSHAKE_FAILED:
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

    def _take(self, arrival: Arrival) -> None:
        current, message = self._conversation, arrival.message
        if isinstance(message, wire.Opened | wire.Refused) and current is None and arrival.session == self._request:
            self._settle(message)
        elif current is None or current.inbox.ended is not None or arrival.session != current.session:
            self._count("unknown_session", "" if isinstance(message, wire.Beat) else f"in {type(message).__name__}")
        elif not current.hear(arrival.sequence, message):
            self._count("replayed", f"{type(message).__name__} number {arrival.sequence}")

    def _settle(self, answer: wire.Opened | wire.Refused) -> None:
        self._request = b""
        if isinstance(answer, wire.Opened):
            dealer = self._dealer
            assert dealer is not None
            transmit = lambda frames: dealer.send_multipart(frames, zmq.NOBLOCK)  # noqa: E731
            self._conversation = Conversation(answer.session, answer.peer, transmit)
            self._answered.set()
            return
        self._state = f"refused: {answer.reason}"
        if answer.final:
            self._answered.set()
        else:
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
        self._state = reason
        self._answered.set()
