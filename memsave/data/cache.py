"""Folders that are made once and kept, named after what they were made from.

A folder appears complete or not at all, also when several processes make it at the same time.
"""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from memsave.data.errors import DataError

NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def cache_root(root: str | Path | None = None) -> Path:
    """The folder of what is kept between runs: `root`, $MEMSAVE_CACHE or ~/.cache/memsave."""
    return Path(root or os.environ.get("MEMSAVE_CACHE") or "~/.cache/memsave").expanduser()


def cached_folder(
    root: str | Path | None, *, name: str, settings: Mapping[str, Any], make: Callable[[Path], object]
) -> Path:
    """The folder of these settings in `root` ($MEMSAVE_CACHE or ~/.cache/memsave); `make(path)` makes it if need be.

    Raises DataError where there is no room for it.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    folder = cache_root(root) / f"{name}-{digest}"
    if not folder.is_dir():
        unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
        try:
            make(unfinished)
            _publish(unfinished, folder=folder)
        except OSError as error:
            if error.errno not in NO_PLACE or _is_elsewhere(error, folder.parent):  # a source that cannot be read
                raise
            raise DataError(
                f"{folder.parent} cannot keep what is generated ({error.strerror}); free space there, or set "
                f"MEMSAVE_CACHE to another folder."
            ) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _is_elsewhere(error: OSError, root: Path) -> bool:
    """Whether the error names a path that is neither in `root` nor above it."""
    if not isinstance(error.filename, str):
        return False
    path, root = Path(error.filename).absolute(), root.absolute()
    return not (path.is_relative_to(root) or root.is_relative_to(path))


def _publish(unfinished: Path, *, folder: Path) -> None:
    """Rename into place; where another process was faster, its folder holds the same and stays."""
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
