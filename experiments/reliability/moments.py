"""Kills at a chosen operation on files, and what a power cut leaves of files that were not flushed.

`Moment.start` runs in the process of a run. Python's audit hook reports the operations (opening a file to write,
renaming, deleting, making a folder); `os.fsync` and the writing of safetensors are wrapped, because they have no audit
event. At the operation of the given number, the process kills itself before the operation takes place.

A journalling file system keeps the order of its operations, so that a kill leaves the folders that a power cut leaves.
The content of a file is lost in a power cut unless the file was flushed by `os.fsync` after it was written.
"""

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC
PATHS = {"os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.truncate": 1, "shutil.rmtree": 1}
"""Audit events, and how many of their first arguments are paths."""


@dataclass
class Moment:
    """The operation at which a process dies. With `number=None`, the operations are counted in the file `count`."""

    roots: Sequence[Path]
    """Only operations below these folders count."""
    number: int | None = None
    power: bool = False
    """Cut the power: files that were not flushed lose content."""
    seed: int = 0
    count: Path | None = None
    _seen: int = 0
    _before: dict[int, tuple[int, int]] = field(default_factory=dict)
    """(time of change, size) by inode, of files that were there at the start."""
    _flushed: dict[int, tuple[int, int]] = field(default_factory=dict)
    """(time of change, size) by inode, when the file was flushed."""

    def start(self) -> None:
        """Watch this process from now on."""
        for path in self._files():
            found = path.stat()
            self._before[found.st_ino] = (found.st_mtime_ns, found.st_size)
        sys.addaudithook(self._hook)
        original = os.fsync

        def fsync(descriptor: int) -> None:
            if self._concerns(Path(f"/proc/self/fd/{descriptor}").readlink()):
                self._next()
            original(descriptor)
            found = os.fstat(descriptor)
            self._flushed[found.st_ino] = (found.st_mtime_ns, found.st_size)

        os.fsync = fsync
        from memsave.training import checkpoint

        checkpoint.save_file = self._halved(checkpoint.save_file)

    def _halved(self, save: Callable[..., None]) -> Callable[..., None]:
        def save_file(tensors: dict[str, Any], path: Path) -> None:
            self._next()
            save(tensors, path)
            self._next(torn=path)

        return save_file

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str) and flags & WRITING and self._concerns(path):
                self._next()
        elif event in PATHS and any(self._concerns(each) for each in arguments[: PATHS[event]]):
            self._next()

    def _concerns(self, path: Any) -> bool:
        if not isinstance(path, (str, os.PathLike)):
            return False
        whole = Path(os.path.abspath(path))  # noqa: PTH100 (resolve() would call audited functions)
        return any(whole.is_relative_to(root) for root in self.roots)

    def _next(self, *, torn: Path | None = None) -> None:
        self._seen += 1
        if self.count is not None:
            descriptor = os.open(self.count, os.O_WRONLY | os.O_CREAT)
            os.write(descriptor, str(self._seen).encode())
            os.close(descriptor)
        if self._seen == self.number:
            self.number = None  # the operations below are not counted
            if torn is not None:
                os.truncate(torn, torn.stat().st_size // 2)
            if self.power:
                self._lose()
            os.kill(os.getpid(), signal.SIGKILL)

    def _files(self) -> Iterator[Path]:
        for root in self.roots:
            if root.is_dir():
                yield from (path for path in sorted(root.rglob("*")) if path.is_file())

    def _lose(self) -> None:
        """Damage files as if the power failed now: cut off, empty, filled with zeros, or by chance complete."""
        rng = random.Random(self.seed)
        for path in self._files():
            found = path.stat()
            written = [each[found.st_ino] for each in (self._before, self._flushed) if found.st_ino in each]
            if found.st_mtime_ns in [time for time, _ in written]:
                continue
            kept = (
                min(max([size for _, size in written], default=0), found.st_size) if "metrics" in path.name else 0
            )  # a line is appended to the old ones
            content, how = path.read_bytes(), rng.randrange(4)
            if how == 0:
                path.write_bytes(content[: rng.randint(kept, len(content))])
            elif how == 1:
                path.write_bytes(content[:kept])
            elif how == 2:
                path.write_bytes(content[:kept] + bytes(len(content) - kept))


def small_disk(folder: Path, *, size: int) -> bool:
    """Mount a disk of so many bytes at the folder, for this process alone; False where the system refuses it."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    users, mounts = 0x10000000, 0x00020000
    user, group = os.getuid(), os.getgid()
    if libc.unshare(mounts) != 0:
        if libc.unshare(users | mounts) != 0:
            return False
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    recursive_private = 0x4000 | 0x40000
    if libc.mount(b"none", b"/", None, recursive_private, None) != 0:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    return bool(libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()) == 0)


def free(folder: Path) -> None:
    """Give a disk of `small_disk` all the space that it wants."""
    import ctypes

    libc, remount = ctypes.CDLL(None, use_errno=True), 32
    if libc.mount(b"none", os.fsencode(folder), b"tmpfs", remount, b"size=1g") != 0:
        raise OSError(ctypes.get_errno(), "the disk cannot be enlarged")
