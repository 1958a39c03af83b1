"""Progress on standard error: a bar on a terminal, otherwise a line every few seconds; both estimate the end."""

import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from memsave.processes import process_rank

SECONDS_BETWEEN_LINES = 10.0
RECENT_STEPS = 50  # the time left is estimated from their speed


class Throttle:
    """Limits how often something is reported."""

    def __init__(self, seconds: float = SECONDS_BETWEEN_LINES):
        self.seconds = seconds
        self._last = time.monotonic()

    def ready(self) -> bool:
        """Return True when `seconds` have passed since it last did, or since the start."""
        now = time.monotonic()
        if now - self._last < self.seconds:
            return False
        self._last = now
        return True


class Bar(Protocol):
    """Counts steps."""

    def advance(self, note: str) -> None:
        """Count one step and show a note, such as its loss."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Discard further output when the reader has gone (`| head`, a closed terminal); the run continues."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


class Progress:
    """Writes to standard error, of several processes only rank 0; standard output stays free for results."""

    def __init__(self, console: Console | None = None, *, silent: bool = False):
        quiet = silent or process_rank() > 0
        self.console = console or _Console(stderr=True, highlight=False, quiet=quiet)

    def say(self, line: str) -> None:
        """Print one line of text without markup."""
        self.console.print(line, markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, total: int, *, done: int = 0) -> Iterator[Bar]:
        """Yield a bar over `total` steps, of which `done` were taken before."""
        if not self.console.is_terminal:
            yield _Lines(self, total, unit="step", done=done, show_last=True)
            return
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        with RichProgress(*columns, TimeRemainingColumn(), console=self.console) as rich:
            yield _Rich(rich, rich.add_task("training", total=total, completed=done, note=""))

    def lines(self, total: int, *, unit: str) -> Bar:
        """Return a bar that prints lines, which may be used inside `bar`; short work prints nothing."""
        return _Lines(self, total, unit=unit)


class _Rich:
    def __init__(self, rich: RichProgress, task: TaskID):
        self.rich, self.task = rich, task

    def advance(self, note: str) -> None:
        self.rich.update(self.task, advance=1, note=note)


class _Lines:
    def __init__(self, progress: Progress, total: int, *, unit: str, done: int = 0, show_last: bool = False):
        self.progress, self.total, self.unit, self.done, self.show_last = progress, total, unit, done, show_last
        self.throttle = Throttle()
        self.times: deque[float] = deque(maxlen=RECENT_STEPS + 1)  # at the ends of the last steps

    def advance(self, note: str) -> None:
        self.done += 1
        self.times.append(time.monotonic())
        if self.throttle.ready() or (self.show_last and self.done == self.total):
            self.progress.say(f"  {self.unit} {self.done} of {self.total}, {note}{self._left()}")

    def _left(self) -> str:
        """The estimated time left; empty after the first step, which is slower than the others, and at the end."""
        if len(self.times) < 2 or self.done >= self.total:
            return ""
        seconds = (self.times[-1] - self.times[0]) / (len(self.times) - 1)
        return f", about {duration(seconds * (self.total - self.done))} left"


def duration(seconds: float) -> str:
    """A time in one or two units, such as 40 s, 3 min or 1 h 20 min."""
    if seconds < 59.5:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes >= 600:
        return f"{round(minutes / 60)} h"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"
