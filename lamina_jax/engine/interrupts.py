"""Ctrl-C that is never lost."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def keeps_ctrl_c() -> Iterator[None]:
    """Raises at its end a KeyboardInterrupt that was raised within it and got lost.

    Python raises KeyboardInterrupt wherever the main thread happens to be. If that is a callback of the garbage
    collector (JAX has one) or a `__del__`, it is printed and dropped, and the user's Ctrl-C does nothing. Does nothing
    outside the main thread, or where someone else handles SIGINT.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler:
        yield
        return
    pressed = False

    def note(number: int, frame: object) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pressed:
        raise KeyboardInterrupt
