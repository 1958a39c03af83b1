"""Protection of a run's folder: a second run in it is refused unless it resumes the first one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memsave.config import ConfigError
from memsave.config.overrides import override
from memsave.training.result import read_result

LOCK = ".lock"
WORK = ("checkpoint", "checkpoint.previous", "model", "metrics.jsonl", "plan.md")
"""Files of a run that a second run would replace or append to."""


def refuse_second_run(folder: Path, *, resume: str | None) -> None:
    """Raise ConfigError if `folder` holds a run and the path `resume` does not continue it."""
    holds = [name for name in WORK if (folder / name).exists()]
    if not holds and read_result(folder).get("status") != "ok":
        return
    if resume is not None and folder.resolve() in (Path(resume).expanduser() / "state.json").resolve().parents:
        return
    raise ConfigError(
        f"{folder} already holds a run ({holds[0] if holds else 'result.json'}); continue it with "
        f"{override('trainer.resume', folder)}, or give another folder by hydra.run.dir="
    )


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the folder's lock within the context; ConfigError if another process holds it.

    The system releases the lock of a killed process. Systems and file systems without locks check nothing.
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
        if not mine:  # held by another process, or released at this moment
            raise ConfigError(
                f"another process runs in {folder}; wait until it ends, or give another folder by hydra.run.dir="
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
