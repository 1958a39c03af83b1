"""Generated folders that are kept between runs, named after their settings.

A folder appears complete or not at all, also when several processes generate it at the same time.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from memsave.data.errors import DataError
from memsave.files import NOT_WRITABLE, create_folder


def cache_root(root: str | Path | None = None) -> Path:
    """The cache folder: `root`, $MEMSAVE_CACHE or ~/.cache/memsave."""
    return Path(root or os.environ.get("MEMSAVE_CACHE") or "~/.cache/memsave").expanduser()


def cached_folder(
    root: str | Path | None, *, name: str, settings: Mapping[str, Any], make: Callable[[Path], object]
) -> Path:
    """Return the folder of these settings in `cache_root(root)`; `make(path)` writes it if it does not exist.

    Raises DataError if the cache cannot be written to.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    folder = cache_root(root) / f"{name}-{digest}"
    if not folder.is_dir():
        try:
            create_folder(folder, make)
        except OSError as error:
            if error.errno not in NOT_WRITABLE or _is_outside(error, folder.parent):  # a source that cannot be read
                raise
            raise DataError(
                f"{folder.parent} cannot keep generated files ({error.strerror}); free space there, or set "
                f"MEMSAVE_CACHE to another folder."
            ) from error
    return folder


def _is_outside(error: OSError, root: Path) -> bool:
    """Whether the error names a path that is neither in `root` nor above it."""
    if not isinstance(error.filename, str):
        return False
    path, root = Path(error.filename).absolute(), root.absolute()
    return not (path.is_relative_to(root) or root.is_relative_to(path))
