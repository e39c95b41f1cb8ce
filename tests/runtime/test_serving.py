"""Sessions of a worker: what it does with them, however they end."""

import dataclasses
import os
import re
import signal
import threading
from collections import deque
from typing import Any

import msgspec
import pytest

from lamina_jax.attention.params import AttendParams
from lamina_jax.runtime import control_tcp
from lamina_jax.runtime.attention_step import message_list
from lamina_jax.runtime.attention_worker import AttentionServant
from lamina_jax.runtime.control_tcp import SessionEnded
from lamina_jax.runtime.kept import KeptPrograms
from lamina_jax.runtime.messages import AttentionWorkerConfig, Bucket, Configure, Prepare, RunStep
from lamina_jax.runtime.serving import MessageError, Servant, serve
from lamina_jax.transport import Role, ShmChannel

TERM = "SIGTERM"
ROLES: tuple[Role, ...] = ("writer", "reader")


class Listener(control_tcp.ControlListener):
    """Has sessions with given messages: an exception ends one, TERM is the signal, an event is waited for."""

    address = "tcp://127.0.0.1:1"

    def __init__(self, *sessions: list[Any]) -> None:
        self._waiting = deque(Session(messages) for messages in sessions)
        self.served: list[Session] = []
        self.closed = False

    def accept(self, timeout_ms: int) -> "Session | None":
        del timeout_ms
        if not self._waiting:
            os.kill(os.getpid(), signal.SIGTERM)
            return None
        self.served.append(self._waiting.popleft())
        return self.served[-1]

    def close(self, reason: str = "") -> None:
        self.closed = True


class Session(control_tcp.Session):
    def __init__(self, messages: list[Any]) -> None:
        self.peer = control_tcp.peer_info()
        self._messages = deque(messages)
        self.ends: list[str] = []

    def receive(self, timeout_ms: int) -> Any:
        del timeout_ms
        if not self._messages:
            return None
        message = self._messages.popleft()
        if message == TERM:
            os.kill(os.getpid(), signal.SIGTERM)
            return None
        if isinstance(message, threading.Event):
            assert message.wait(60)
            return None
        if isinstance(message, Exception):
            raise message
        return message

    def close(self, reason: str) -> None:
        self.ends.append(f"closed: {reason}")

    def refuse(self, reason: str) -> None:
        self.ends.append(f"refused: {reason}")


class Step:
    """Obeyed until it is aborted."""

    def __init__(self) -> None:
        self.begun = threading.Event()


@dataclasses.dataclass
class Raise:
    """Cannot be obeyed."""

    error: Exception


class Recorder(Servant):
    """Obeys what the tests ask for."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.broken: Exception | None = None
        self._aborted = threading.Event()

    def obey(self, message: Any) -> None:
        self.calls.append(message)
        if isinstance(message, Raise):
            raise message.error
        if isinstance(message, Step):
            message.begun.set()
            assert self._aborted.wait(60)
            raise RuntimeError("what it waited for was aborted")
        if message == "break":
            self.broken = RuntimeError("a step failed")

    def watch(self) -> None:
        if self.broken is not None:
            raise self.broken

    def reason(self, error: Exception) -> str:
        return f"explained {error}"

    def finish(self) -> None:
        self.calls.append("finish")

    def abort(self) -> None:
        self._aborted.set()

    def close(self) -> None:
        assert self._aborted.is_set()
        self.calls.append("close")


@pytest.fixture
def serve_all():
    """Serves sessions with some messages each; returns the ends of each, and what the servants did."""

    def run(*sessions: list[Any]) -> tuple[list[list[str]], list[list[Any]]]:
        listener, servants = Listener(*sessions), []

        def make(session: Any) -> Servant:
            del session
            servants.append(Recorder())
            return servants[-1]

        before = signal.getsignal(signal.SIGTERM)
        serve(listener, make, name="worker", waits_for="a test")
        assert listener.closed
        assert signal.getsignal(signal.SIGTERM) == before
        return [session.ends for session in listener.served], [servant.calls for servant in servants]

    return run


def test_session_that_the_other_end_closes(serve_all):
    step = Step()
    ends, calls = serve_all([step, "next", step.begun, SessionEnded("gone")], [SessionEnded("gone, too")])
    assert ends == [["closed: gone"], ["closed: gone, too"]]
    # What is under way is aborted; what comes behind it is not begun.
    assert calls == [[step, "close"], ["close"]]


@pytest.mark.parametrize(
    ("message", "end"),
    [
        (Raise(RuntimeError("no memory")), "closed: explained no memory"),
        (Raise(MessageError("out of turn")), "refused: out of turn"),
        (Raise(SessionEnded("gone as it answered")), "closed: gone as it answered"),
        ("break", "closed: explained a step failed"),
    ],
)
def test_session_that_fails_is_over_and_the_next_one_served(serve_all, message, end):
    ends, calls = serve_all([1, message], [SessionEnded("gone")])
    assert ends == [[end], ["closed: gone"]]
    assert calls == [[1, message, "close"], ["close"]]


def test_sigterm_finishes_what_was_asked(serve_all):
    ends, calls = serve_all([1, 2, TERM, 3])
    assert ends == [["closed: it was told to end"]]
    assert calls == [[1, 2, "finish", "close"]]


def configuration(*messages: str) -> Configure:
    config = AttentionWorkerConfig(
        name="attention worker 7",
        layers=(AttendParams(scale=1.0),),
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        dtype="float32",
        page_size=4,
        num_pages=2,
        max_step_tokens=16,
        kernel="xla",
    )
    return Configure(config=config, messages=messages, inboxes=(), outboxes=())


def test_messages_that_differ_name_both_sides():
    servant = AttentionServant(lambda message: None, KeptPrograms(), peer="model worker on elsewhere")
    own = r"q float32\[1, 16, 4, 8\], kv float32\[1, 16, 2, 8\] float32\[1, 16, 2, 8\], attended float32\[1, 16, 4, 8\]"
    with pytest.raises(
        RuntimeError, match=f"^attention worker 7 expects .* {own}, the model worker on elsewhere has q"
    ):
        servant.obey(configuration("q bfloat16[1, 16, 4, 8]"))


def test_message_out_of_turn_is_refused():
    servant = AttentionServant(lambda message: None, KeptPrograms())
    with pytest.raises(MessageError, match="Prepare came before Configure"):
        servant.obey(Prepare(bucket=Bucket(batch=1, tokens=1, max_pages=1), num_batches=1))


@pytest.mark.parametrize("batches", [(1,), (0, 0)])
def test_step_of_batches_that_there_are_not_is_refused(batches):
    ends = [ShmChannel.create(role=role, peer="model worker", messages=[], slot_bytes=4096) for role in ROLES]
    configure = configuration(*message_list(configuration().config))
    addresses = {"inboxes": (ends[0].address,), "outboxes": (ends[1].address,)}
    servant = AttentionServant(lambda message: None, KeptPrograms())
    with ends[0], ends[1]:
        servant.obey(msgspec.structs.replace(configure, **addresses))
        step = RunStep(Bucket(batch=1, tokens=1, max_pages=1), batches, bytes(8), bytes(8), bytes(8))
        with pytest.raises(MessageError, match=re.escape(f"expected different batches below 1, got {batches}")):
            servant.obey(step)
        servant.abort()
        servant.close()
