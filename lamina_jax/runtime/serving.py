"""A worker of a cluster: serves one session after another, until it is told to end."""

import abc
import gc
import os
import queue
import signal
import threading
from collections.abc import Callable
from typing import Any, Final

from absl import logging

from lamina_jax.runtime.control_tcp import ControlListener, Session, SessionEnded

_POLL_MS: Final = 50
# Loading weights or compiling a step cannot be interrupted.
_END_TIMEOUT_S: Final = 1800.0


class MessageError(Exception):
    """A message makes no sense: it is out of turn, or its parts do not fit together."""


class Servant(abc.ABC):
    """What a worker does for one session.

    `obey` is called by a thread of its own, so that it may take its time; `watch` and `abort` by the one that has the
    session, also while `obey` runs; the others when `obey` does not run any more.
    """

    @abc.abstractmethod
    def obey(self, message: Any) -> None:
        """Does what a message asks. Any exception ends the session; MessageError is for what makes no sense."""

    @abc.abstractmethod
    def watch(self) -> None:
        """Raises the error of something that has failed since the last call."""

    @abc.abstractmethod
    def reason(self, error: Exception) -> str:
        """What to tell the other end of an error of `obey` or `watch`."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Waits for what is under way."""

    @abc.abstractmethod
    def abort(self) -> None:
        """Makes what is under way fail soon."""

    @abc.abstractmethod
    def close(self) -> None:
        """Frees all that the session had; `abort` was called before, or nothing is under way."""


def serve(listener: ControlListener, make_servant: Callable[[Session], Servant], *, name: str, waits_for: str) -> None:
    """Serves sessions until SIGTERM or Ctrl-C; then finishes what is under way, tells the other end, and returns.

    Must be called by the main thread, which gets the signal. A session that fails ends, and the worker waits for the
    next one.

    Args:
        make_servant: called for every session.
        name: of this worker in the log.
        waits_for: who opens sessions, e.g. "an engine".
    """
    ending = threading.Event()
    before = {n: signal.signal(n, lambda *_: ending.set()) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        while (session := _next_session(listener, ending, name, waits_for)) is not None:
            logging.info("%s: session with %s on %s", name, waits_for, session.peer)
            reason = _serve_session(session, make_servant(session), ending)
            # Tracebacks make cycles, which would keep the cache of this session until after that of the next is made.
            gc.collect()
            logging.info("%s: session over: %s", name, reason)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        listener.close()


def _next_session(listener: ControlListener, ending: threading.Event, name: str, waits_for: str) -> Session | None:
    """The next session; None if the worker is to end before there is one."""
    logging.info("%s: waiting for %s at %s", name, waits_for, listener.address)
    while not ending.is_set():
        if (session := listener.accept(_POLL_MS)) is not None:
            return session
    return None


def _serve_session(session: Session, servant: Servant, ending: threading.Event) -> str:
    """Serves a session to its end and frees all that it had; returns why it ended."""
    obeying = _Obeying(servant)
    draining, end = False, session.close
    try:
        while not obeying.ended:
            message = session.receive(_POLL_MS)
            if ending.is_set() and not draining:
                draining = True
                obeying.finish()
            elif message is not None and not draining:
                obeying.take(message)
            servant.watch()
        obeying.check()
        reason = "it was told to end"
    except SessionEnded as ended:
        reason = str(ended)
    except MessageError as error:
        reason, end = str(error), session.refuse
    except Exception as error:
        logging.info("the session failed", exc_info=True)
        reason = servant.reason(error)
    servant.abort()
    if not obeying.stop(_END_TIMEOUT_S):
        logging.error("what the session was doing did not end in %.0f s; giving up", _END_TIMEOUT_S)
        logging.flush()
        os._exit(1)
    servant.close()
    end(reason)
    return reason


class _Obeying:
    """Has a servant obey one message after another, in a thread of its own."""

    def __init__(self, servant: Servant) -> None:
        self._servant = servant
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stopped = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="obeys", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether it failed, or has finished."""
        return not self._thread.is_alive()

    def take(self, message: Any) -> None:
        """Queues a message."""
        self._messages.put(message)

    def finish(self) -> None:
        """Ends once all that was taken is done."""
        self._messages.put(None)

    def stop(self, timeout_s: float) -> bool:
        """Ends after the message of now; False if that takes too long."""
        self._stopped = True
        self._messages.put(None)
        self._thread.join(timeout_s)
        return self.ended

    def check(self) -> None:
        """Raises the error of a message that could not be obeyed."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while (message := self._messages.get()) is not None and not self._stopped:
                self._servant.obey(message)
            if not self._stopped:
                self._servant.finish()
        except Exception as error:
            self._error = error
