"""A run's folder belongs to one run: a second run there, at the same time or later, is refused unless it resumes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memsave.config import ConfigError
from memsave.config.overrides import override
from memsave.training.result import read_result

LOCK = ".lock"
WORK = ("checkpoint", "checkpoint.previous", "model", "metrics.jsonl", "plan.md")
"""What a run leaves that another one would replace or append to."""


def refuse_second_run(folder: Path, *, resume: str | None) -> None:
    """Raise ConfigError where `folder` holds the work of a run that `resume`, a path, does not continue."""
    holds = [name for name in WORK if (folder / name).exists()]
    if not holds and read_result(folder).get("status") != "ok":
        return
    if resume is not None and folder.resolve() in (Path(resume).expanduser() / "state.json").resolve().parents:
        return
    raise ConfigError(
        f"{folder} holds a run already ({holds[0] if holds else 'result.json'}); continue it with "
        f"{override('trainer.resume', folder)}, or give another folder by hydra.run.dir="
    )


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within, the folder is this process's; ConfigError while it is another's. The system frees it when one is killed.

    On systems and file systems without locks nothing is checked.
    """
    try:
        import fcntl
    except ModuleNotFoundError:
        yield
        return
    path = folder / LOCK
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino
        except BlockingIOError:
            mine = False
        except OSError:
            mine = True
        if not mine:  # held, or freed in this very moment
            raise ConfigError(
                f"another process runs in {folder}; wait for its end, or give another folder by hydra.run.dir="
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
