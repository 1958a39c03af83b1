"""How a run that did not succeed is reported: its status, its exit code, and one sentence with the remedy."""

import errno
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from memsave.config import ConfigError
from memsave.config.compose import to_objects
from memsave.config.overrides import override
from memsave.failures import Interrupted, ProcessLost
from memsave.files import DISK_FULL, newest_folder
from memsave.processes import process_rank


def failed(error: Exception, config: DictConfig, folder: Path) -> tuple[str, int, dict[str, Any]]:
    """Print a sentence about the error; returns (status, exit code, entries of the result)."""
    if isinstance(error, Interrupted):
        return interrupted(folder, error)
    status, code, message = explain(error, config, folder)
    return status, print_error(message, code=code), {"error": message, **getattr(error, "outcome", {})}


def interrupted(folder: Path, stop: BaseException) -> tuple[str, int, dict[str, Any]]:
    """Print that the run was interrupted; returns (status, exit code, entries of the result)."""
    saved = newest_folder(folder / "checkpoint").exists()
    print(f"interrupted; continue with {_resume(folder)}" if saved else "interrupted", file=sys.stderr)
    return "interrupted", 130, getattr(stop, "outcome", {})


def explain(error: Exception, config: DictConfig, folder: Path) -> tuple[str, int, str]:
    """(status, exit code, one sentence) of an error."""
    from memsave.data import DataError
    from memsave.planning.budget import OverBudget
    from memsave.privacy import PrivacyError
    from memsave.tasks.definition import definition_of
    from memsave.training.checkpoint import CheckpointError
    from memsave.training.loop import TrainingError
    from memsave.training.memory_error import is_out_of_memory

    saved = newest_folder(folder / "checkpoint").exists()
    if isinstance(error, DataError) and saved:
        return "failed", 2, f"{error} Then continue with {_resume(folder)}"
    if isinstance(error, (ConfigError, DataError, CheckpointError, PrivacyError)):
        return "failed", 2, str(error)
    if isinstance(error, ProcessLost):
        return "failed", 1, f"{error}; continue with {_resume(folder)}" if saved else str(error)
    if isinstance(error, TrainingError):
        return "failed", 1, str(error)
    task = definition_of(to_objects(config))  # not earlier: the error may be that the config is not valid
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        extra = {"tensorboard": "tensorboard", "nilearn": "mni"}.get(package, task.pip_extra)
        wanted = package if extra is None else f"'memsave[{extra}]'"
        message = f"the package {package} is not installed; install it with: pip install {wanted}"
        return "failed", 2, message
    if _is_disk_fault(error, folder):
        return "failed", 1, disk_message(folder, error)
    if is_out_of_memory(error):
        return "oom", 3, f"the step does not fit into memory; try {', '.join(task.less_memory())}"
    if isinstance(error, OverBudget):
        return "over_budget", 3, f"{error}; try {', '.join(task.less_memory())}"
    (folder / "error.txt").write_text("".join(traceback.format_exception(error)))
    remedy = f"; after fixing it, continue with {_resume(folder)}" if saved else ""
    return "failed", 1, f"{type(error).__name__}: {error} (traceback: {folder / 'error.txt'}){remedy}"


def _is_disk_fault(error: BaseException, folder: Path) -> bool:
    """Whether the disk is full or the folder is not writable."""
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM):
        return str(error.filename).startswith(str(folder))
    return _error_number(error) in DISK_FULL


def _error_number(error: BaseException) -> int | None:
    """The errno of an error; safetensors writes it into its message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def disk_message(folder: Path, error: BaseException) -> str:
    """One sentence about a folder that cannot be written."""
    number = _error_number(error)
    cause = getattr(error, "strerror", None) or os.strerror(errno.ENOSPC if number is None else number)
    path = getattr(error, "filename", None) or folder
    remedy = f", then continue with {_resume(folder)}" if newest_folder(folder / "checkpoint").exists() else ""
    return f"{path} cannot be written ({cause}); free space or give another folder by hydra.run.dir={remedy}"


def _resume(folder: Path) -> str:
    return override("trainer.resume", folder)


def print_error(error: object, *, code: int) -> int:
    """Print a sentence, in rank 0 alone; returns the exit code."""
    if process_rank() == 0:
        print(f"memsave: {error}", file=sys.stderr)
    return code
