"""Progress for people: a bar on a terminal, a line now and then anywhere else."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

SECONDS_BETWEEN_LINES = 10.0


class Bar(Protocol):
    """Counts steps."""

    def advance(self, note: str) -> None:
        """One step more, with a note such as its loss."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Whoever read has gone (`| head`, a closed terminal); the run goes on, and tells nobody."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


class Progress:
    """Writes to standard error, so that standard output stays free."""

    def __init__(self, console: Console | None = None):
        self.console = console or _Console(stderr=True, highlight=False)

    def say(self, line: str) -> None:
        """One line of text, as it is."""
        self.console.print(line, markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, total: int, *, done: int = 0) -> Iterator[Bar]:
        """A bar over `total` steps of which `done` are behind."""
        if not self.console.is_terminal:
            yield _Lines(self, total, unit="step", done=done, last_too=True)
            return
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        with RichProgress(*columns, TimeRemainingColumn(), console=self.console) as rich:
            yield _Rich(rich, rich.add_task("training", total=total, completed=done, note=""))

    def lines(self, total: int, *, unit: str) -> Bar:
        """The same by a line now and then, which can be within a bar; what is over sooner has none."""
        return _Lines(self, total, unit=unit)


class _Rich:
    def __init__(self, rich: RichProgress, task: TaskID):
        self.rich, self.task = rich, task

    def advance(self, note: str) -> None:
        self.rich.update(self.task, advance=1, note=note)


class _Lines:
    def __init__(self, progress: Progress, total: int, *, unit: str, done: int = 0, last_too: bool = False):
        self.progress, self.total, self.unit, self.done, self.last_too = progress, total, unit, done, last_too
        self.last = time.monotonic()

    def advance(self, note: str) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.last >= SECONDS_BETWEEN_LINES or (self.last_too and self.done == self.total):
            self.last = now
            self.progress.say(f"  {self.unit} {self.done} of {self.total}, {note}")
