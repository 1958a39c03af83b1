"""Stopping a run between two steps, where its state is whole.

A signal in the middle of a step would leave some parameters moved and some not, or random numbers drawn for a step that
never was: a checkpoint of that would silently continue as another run.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Within, the yielded function tells of a first SIGINT or SIGTERM; a second one interrupts at once."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread alone
        yield lambda: False
        return
    before = [(number, signal.signal(number, note)) for number in SIGNALS]
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before:
            signal.signal(number, handler)
