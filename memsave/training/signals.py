"""Stopping a run between two steps, when its state is consistent.

An interrupt in the middle of a step can leave some parameters updated and others not, or random numbers drawn for an
incomplete step. A run that continued from such a state would silently differ from an uninterrupted one.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
SECONDS = 1.0  # a launcher and the terminal may both forward the same Ctrl-C


def interrupt_at_signals() -> None:
    """Make every signal of SIGNALS raise KeyboardInterrupt, as Ctrl-C does."""
    for number in _handled():
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _handled() -> list[int]:
    """The SIGNALS that this process does not ignore; under nohup it ignores SIGHUP."""
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns True once a signal has arrived.

    A second signal, more than SECONDS after the first one, raises KeyboardInterrupt at once.
    """
    arrivals: list[float] = []

    def note(number: int, frame: Any) -> None:
        if arrivals and time.monotonic() - arrivals[0] > SECONDS:
            raise KeyboardInterrupt
        arrivals.append(time.monotonic())

    if threading.current_thread() is not threading.main_thread():  # Python handles signals only in the main thread
        yield lambda: False
        return
    before = [(number, signal.signal(number, note)) for number in _handled()]
    try:
        yield lambda: bool(arrivals)
    finally:
        for number, handler in before:
            signal.signal(number, handler)
