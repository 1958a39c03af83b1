"""Commands of memsave in forked processes: torch and memsave are imported once, and each command takes seconds.

The process that forks must not start threads. `preload` therefore only imports.
"""

import contextlib
import os
import pickle
import resource
import runpy
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POLL = 0.005
SECONDS = 120.0
"""A command that takes longer is killed and counts as hung."""
MEMORY = 16 * 2**30
"""Address space of a command, so that a header that promises terabytes cannot fill the machine."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """Exit code; minus the number of the signal that killed it."""
    out: str
    err: str
    seconds: float
    hung: bool = False

    @property
    def killed(self) -> bool:
        """Whether SIGKILL ended the command."""
        return self.code == -signal.SIGKILL and not self.hung


@dataclass(frozen=True)
class Command:
    """`python -m MODULE ARGUMENTS`, started in `folder`."""

    arguments: list[str]
    folder: Path
    module: str = "memsave.run"
    variables: Mapping[str, str] = field(default_factory=dict)
    """Further environment variables."""
    before: Callable[[], None] | None = None
    """Runs in the new process, before the command."""
    kill_after: float | None = None
    """SIGKILL after so many seconds."""
    seconds: float = SECONDS
    stdin: str = ""
    """What the command can read from standard input."""


def preload() -> None:
    """Import what the commands need."""
    import nibabel  # noqa: F401
    import opacus.accountants  # noqa: F401
    import torch
    from transformers import GPT2LMHeadModel  # noqa: F401

    import memsave.experiment
    import memsave.generate
    import memsave.predict
    import memsave.run
    import memsave.tasks.language.generation
    import memsave.tasks.segmentation.task  # noqa: F401

    torch.set_num_threads(1)


def run(command: Command) -> Ended:
    """Run the command to its end."""
    command.folder.mkdir(parents=True, exist_ok=True)
    outputs = [command.folder.parent / f".{command.folder.name}.{os.getpid()}.{name}" for name in ("out", "err")]
    started = time.perf_counter()
    process = _forked(lambda: _become(command, outputs))
    status, hung = _wait(process, limit=command.seconds, kill_after=command.kill_after)
    said = [path.read_text(errors="replace") for path in outputs]
    for path in outputs:
        path.unlink()
    return Ended(os.waitstatus_to_exitcode(status), *said, time.perf_counter() - started, hung)


def isolated(function: Callable[..., Any], *args: Any, seconds: float = 10 * SECONDS) -> Any:
    """`function(*args)`, computed in a forked process that may change what it likes; its error is raised here."""
    reading, writing = os.pipe()

    def answer() -> None:
        os.close(reading)
        try:
            content = pickle.dumps((True, function(*args)))
        except BaseException:
            content = pickle.dumps((False, traceback.format_exc()))
        with open(writing, "wb") as file:  # noqa: PTH123 (a descriptor)
            file.write(content)

    process = _forked(answer)
    os.close(writing)
    with open(reading, "rb") as file:  # noqa: PTH123 (a descriptor)
        content = file.read()
    _wait(process, limit=seconds)
    ok, found = pickle.loads(content) if content else (False, "the process ended without an answer")
    if not ok:
        raise RuntimeError(found)
    return found


def _forked(body: Callable[[], None]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        os.setsid()
        body()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _become(command: Command, outputs: list[Path]) -> None:
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    reading, writing = os.pipe()
    os.write(writing, command.stdin.encode())
    os.close(writing)
    os.dup2(reading, 0)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.chdir(command.folder)
    os.environ.update(command.variables)
    sys.path.insert(0, str(command.folder))
    sys.argv = [command.module, *command.arguments]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.filterwarnings("ignore", module="runpy")  # the module was imported before
    if command.before is not None:
        command.before()
    runpy.run_module(command.module, run_name="__main__", alter_sys=True)


def _wait(process: int, *, limit: float, kill_after: float | None = None) -> tuple[int, bool]:
    """(wait status, whether the process hung)."""
    started, hung = time.monotonic(), False
    end = limit if kill_after is None else min(limit, kill_after)
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return status, hung
        if time.monotonic() - started > end:
            hung = kill_after is None or end < kill_after
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
            return os.waitpid(process, 0)[1], hung
        time.sleep(POLL)
