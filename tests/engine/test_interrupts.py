"""Ctrl-C at the worst moment."""

import os
import signal
import threading

import pytest

from lamina_jax.engine.interrupts import keeps_ctrl_c


@pytest.fixture(autouse=True)
def default_handler():
    # Whoever started the tests in the background of a shell has them ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class PressesCtrlC:
    """Sends SIGINT to this process while it is being collected, where Python drops exceptions."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # the interpreter handles signals between instructions
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupt_lost_in_a_destructor_comes_back():
    reached = []

    def work():
        with keeps_ctrl_c():
            PressesCtrlC()
            reached.append(True)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == [True]  # it was lost, or this had not been reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupt_that_is_not_lost_is_raised_at_once():
    reached = []

    def work():
        with keeps_ctrl_c():
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass
            reached.append(True)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_exceptions_pass():
    with pytest.raises(ValueError, match="mine"), keeps_ctrl_c():
        raise ValueError("mine")


def test_leaves_a_users_handler_alone():
    seen = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with keeps_ctrl_c():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]


def test_does_nothing_in_another_thread():
    done = []

    def work():
        with keeps_ctrl_c():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert done == [True]
