"""A command of several processes: rank 0 reads the command line and leads, and the others do what it tells them.

torchrun starts the same command in each process. Rank 0 alone composes the config, chooses the folder, writes and
prints; it sends the others one order: a run to take part in, or the exit code of a command that ended before one.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import memsave
from memsave.config import Config, ConfigError
from memsave.process_group import refuse_differences, start_group
from memsave.processes import broadcast, process_count

_ordered = False


@dataclass(frozen=True)
class Run:
    """A run to take part in."""

    config: Config
    folder: Path
    strategies: list[str] | None


@dataclass(frozen=True)
class Order:
    """What rank 0 tells the other processes, once."""

    run: Run | None
    code: int = 0
    """The exit code, without a run."""


def start_processes(arguments: Sequence[str]) -> None:
    """Start the group of the processes that torchrun started, if there are several.

    Raises ConfigError if they do not have the same command and code, or for a sweep.
    """
    if not start_group():
        return
    refuse_differences({"the command": list(arguments), "the version of the code": code_version()})
    if {"-m", "--multirun"} & set(arguments):
        raise ConfigError(
            f"a sweep starts the processes of its jobs itself; leave torchrun out and give trainer.processes="
            f"{process_count()}"
        )


def code_version() -> str:
    """The versions of memsave and torch, and a digest of the source of memsave."""
    digest, root = hashlib.sha256(), Path(memsave.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return f"{memsave.__version__} {torch.__version__} {digest.hexdigest()[:16]}"


def give_order(run: Run) -> None:
    """Tell the other processes to take part in the run."""
    global _ordered
    if not _ordered:
        _ordered = True
        broadcast(Order(run))


def end_followers(code: int) -> None:
    """Let the other processes exit with the code, if no run was ordered."""
    global _ordered
    if not _ordered:
        _ordered = True
        broadcast(Order(None, code))


def receive_order() -> Order:
    """The order of rank 0."""
    received: Order | None = broadcast(None)
    assert received is not None
    return received
