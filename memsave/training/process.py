"""Resident memory of the whole process on Linux, a quantity separate from live tensor bytes.

glibc keeps freed blocks of up to 32 MiB for reuse, which can make a process 1.5 times as large as its live data. Two
environment variables set its thresholds at the start of a process (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_);
`return_freed_memory` sets the same thresholds by mallopt(3) in a running process.
"""

import ctypes
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of malloc.h
THRESHOLD = 65536
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def return_freed_memory() -> bool:
    """Make malloc return freed blocks of 64 KiB and more to the system at once, and those freed earlier now.

    False if malloc is not glibc's.
    """
    if not _mallopt({M_MMAP_THRESHOLD: THRESHOLD, M_TRIM_THRESHOLD: THRESHOLD}):
        return False
    ctypes.CDLL(None).malloc_trim(0)
    return True


def keep_freed_memory() -> bool:
    """Make malloc keep all freed memory, which avoids repeated page faults; False if malloc is not glibc's."""
    return _mallopt({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1})


def _mallopt(options: dict[int, int]) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(option, value) == 1 for option, value in options.items())


def reset_process_peak() -> None:
    """Reset the peak of `process_peak` to the current resident bytes."""
    try:
        CLEAR.write_text("5")  # see proc(5)
    except OSError:
        return


def process_peak() -> int | None:
    """Peak resident bytes of this process since its start or `reset_process_peak`; None if the system has no count."""
    return _status("VmHWM")


def process_bytes() -> int | None:
    """Current resident bytes of this process; None if the system has no count."""
    return _status("VmRSS")


def _status(field: str) -> int | None:
    if not STATUS.is_file():
        return None
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None
