"""The exception of `memsave.data`, and how readers report it: the first fault ends them, unless all are collected."""

import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


class DataError(ValueError):
    """Data that cannot be used; the message is one sentence that names the fault and the remedy."""


def raise_first(faults: Sequence[str], **options: Any) -> None:
    """Raise DataError for the first fault, if there is one, with the command whose `options` list the others."""
    if len(faults) > 1:
        rest = "1 more fault is" if len(faults) == 2 else f"{len(faults) - 1} more faults are"
        texts = {k: str(v) if isinstance(v, (str, Path)) else f"[{','.join(v)}]" for k, v in options.items() if v}
        command = shlex.join(["python", "-m", "memsave.data.check", *(f"{k}={v}" for k, v in texts.items())])
        raise DataError(f"{faults[0].removesuffix('.')}; {rest} listed by {command}.")
    if faults:
        raise DataError(faults[0])


class _Faults(list[DataError]):
    """The faults of one `collecting_faults`, with a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.number = next(_numbers)


_numbers = count(1)
_faults: ContextVar[_Faults | None] = ContextVar("faults", default=None)


@contextmanager
def collecting_faults() -> Iterator[list[DataError]]:
    """Context in which readers leave out the rows that they cannot use; yields the list of their faults."""
    found = _Faults()
    token = _faults.set(found)
    try:
        yield found
    finally:
        _faults.reset(token)


def report(fault: DataError) -> None:
    """Raise the fault of a row. Inside `collecting_faults`, keep it; the caller then leaves the row out."""
    found = _faults.get()
    if found is None:
        raise fault
    found.append(fault)


def read_each(paths: Iterable[Path], read: Callable[[Path], list[Made]]) -> list[list[Made]]:
    """The rows of each file; a DataError of a whole file is reported, and the file then has none."""
    found: list[list[Made]] = []
    for path in paths:
        try:
            found.append(read(path))
        except DataError as fault:
            report(fault)
            found.append([])
    return found


def faults_so_far() -> int:
    """The number of faults that were kept; 0 outside of `collecting_faults`."""
    return len(_faults.get() or ())


def collection() -> int:
    """The number of the current `collecting_faults`, 0 outside: a part of the key of a cache of what was read."""
    found = _faults.get()
    return 0 if found is None else found.number


def made(rows: Iterable[Given], make: Callable[[Given], Made]) -> Iterator[Made]:
    """Yield `make(row)` of each row; a DataError of it is reported."""
    for row in rows:
        try:
            result = make(row)
        except DataError as fault:
            report(fault)
        else:
            yield result
