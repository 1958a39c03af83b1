"""What the whole process takes from the system: another quantity than live tensor bytes, and never mixed with them.

glibc keeps freed blocks of up to 32 MiB for later, so that a process looks half as large again as what it holds. Its
two thresholds are environment variables read when a process starts (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_);
`return_freed_memory` sets the same two by mallopt(3) in a process that runs. Linux alone.
"""

import ctypes
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of malloc.h
THRESHOLD = 65536
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def return_freed_memory() -> bool:
    """Have malloc give blocks of 64 KiB and more back as soon as they are freed; False where it is not glibc's."""
    return _mallopt({M_MMAP_THRESHOLD: THRESHOLD, M_TRIM_THRESHOLD: THRESHOLD})


def keep_freed_memory() -> bool:
    """Have malloc keep all that is freed, so that no page is touched for the first time twice; False as above."""
    return _mallopt({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1})


def _mallopt(options: dict[int, int]) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(option, value) == 1 for option, value in options.items())


def restart_peak() -> None:
    """Let `process_peak` forget what was before."""
    try:
        CLEAR.write_text("5")  # see proc(5)
    except OSError:
        return


def process_peak() -> int | None:
    """The most resident bytes of this process since it began, or since `restart_peak`; None where nobody counts."""
    return _status("VmHWM")


def process_bytes() -> int | None:
    """The resident bytes of this process now; None where nobody counts."""
    return _status("VmRSS")


def _status(field: str) -> int | None:
    if not STATUS.is_file():
        return None
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None
