"""Progress for people: a bar on a terminal, a line now and then anywhere else."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

SECONDS_BETWEEN_LINES = 10.0


class Bar(Protocol):
    """Counts steps."""

    def advance(self, note: str) -> None:
        """One step more, with a note such as its loss."""


class Progress:
    """Writes to standard error, so that standard output stays free."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True, highlight=False)

    def say(self, line: str) -> None:
        """One line of text, as it is."""
        self.console.print(line, markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, total: int, *, done: int = 0) -> Iterator[Bar]:
        """A bar over `total` steps of which `done` are behind."""
        if not self.console.is_terminal:
            yield _Lines(self, total, done)
            return
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        with RichProgress(*columns, TimeRemainingColumn(), console=self.console) as rich:
            yield _Rich(rich, total, done)


class _Rich:
    def __init__(self, rich: RichProgress, total: int, done: int):
        self.rich = rich
        self.task = rich.add_task("training", total=total, completed=done, note="")

    def advance(self, note: str) -> None:
        self.rich.update(self.task, advance=1, note=note)


class _Lines:
    def __init__(self, progress: Progress, total: int, done: int):
        self.progress, self.total, self.done = progress, total, done
        self.last = time.monotonic()

    def advance(self, note: str) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.last >= SECONDS_BETWEEN_LINES or self.done == self.total:
            self.last = now
            self.progress.say(f"  step {self.done} of {self.total}, {note}")
