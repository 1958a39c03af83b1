"""Atomic writes: a reader finds the old content or the complete new content, never a part.

Content is written to a temporary path in the same folder, flushed to the disk, and renamed: without the flush, a power
cut can leave an empty file under the new name. Standard library alone.
"""

import errno
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""The errors of a disk that takes no more data, or no file of this size."""
NOT_WRITABLE = (*DISK_FULL, errno.EACCES, errno.EPERM)
"""The errors of a disk or a folder that takes no more data."""
PREVIOUS = ".previous"
"""The suffix of the folder that `replace_folder` replaced."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path with the suffixes of `path`; rename it to `path` at the end, delete it on an error."""
    draft = path.with_name(f".new.{path.name}")
    try:
        yield draft
        flush(draft)
        draft.replace(path)
        flush(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, content: Any, *, sort_keys: bool = False) -> None:
    """Write indented JSON atomically."""
    with replacing(path) as draft:
        draft.write_text(json.dumps(content, indent=2, sort_keys=sort_keys) + "\n")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError, also for text that is nested deeper than Python can read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def create_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Create `folder` with the content that `write(path)` writes to a temporary path.

    Several processes may do so at the same time: the first one to finish wins, and the others keep its folder.
    """
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        write(draft)
        flush_all(draft)
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def replace_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Replace `folder` by the files that `write(path)` writes, flushed to the disk; keep the old one as `.previous`.

    A process that is killed at any moment leaves a complete folder, which `newest_folder` finds.
    """
    draft = start_draft(folder)
    try:
        write(draft)
        finish_draft(folder)
    except BaseException:
        drop_draft(folder)
        raise


def start_draft(folder: Path) -> Path:
    """Create the empty folder whose files will replace `folder` (see `replace_folder`)."""
    draft = draft_of(folder)
    newest = newest_folder(folder)
    if newest != folder:
        newest.rename(folder)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    return draft


def draft_of(folder: Path) -> Path:
    """The path of the draft."""
    return folder.with_name(folder.name + ".new")


def drop_draft(folder: Path) -> None:
    """Delete the draft: on a full disk it would take the space of the run's result."""
    shutil.rmtree(draft_of(folder), ignore_errors=True)


def finish_draft(folder: Path) -> None:
    """Flush the draft to the disk, and put it in the place of `folder`, which becomes `.previous`."""
    draft, previous = draft_of(folder), folder.with_name(folder.name + PREVIOUS)
    flush_all(draft)
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    draft.rename(folder)
    flush(folder.parent)


def newest_folder(folder: Path) -> Path:
    """`folder`, or `.previous` if a process was killed between the two renames of `replace_folder`."""
    previous = folder.with_name(folder.name + PREVIOUS)
    return previous if previous.exists() and not folder.exists() else folder


def checksum(path: Path) -> int:
    """The CRC-32 of a file."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            found = zlib.crc32(block, found)
    return found


def flush_all(folder: Path) -> None:
    """`flush` a folder and everything in it."""
    for path in (*folder.rglob("*"), folder):
        flush(path)


def flush(path: Path) -> None:
    """Write a file's content or a folder's entries from the system's cache to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
