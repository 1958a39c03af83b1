"""Stopping a run between two steps, where its state is whole.

A signal in the middle of a step would leave some parameters moved and some not, or random numbers drawn for a step that
never was: a checkpoint of that would silently continue as another run.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
SECONDS = 1.0  # a launcher, and the terminal itself, may pass the same Ctrl-C on twice


def interrupt_at_signals() -> None:
    """Have every signal to stop interrupt this process as Ctrl-C does."""
    for number in _heard():
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _heard() -> list[int]:
    """Those of SIGNALS that this process does not ignore, as nohup has it ignore SIGHUP."""
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Within, the yielded function tells of a first signal to stop; one more than SECONDS later interrupts at once."""
    asked: list[float] = []

    def note(number: int, frame: Any) -> None:
        if asked and time.monotonic() - asked[0] > SECONDS:
            raise KeyboardInterrupt
        asked.append(time.monotonic())

    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread alone
        yield lambda: False
        return
    before = [(number, signal.signal(number, note)) for number in _heard()]
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before:
            signal.signal(number, handler)
