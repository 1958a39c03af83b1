"""Budgets: the free memory of this machine, and the error for a run that exceeds `budget=16GiB`."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from memsave.processes import process_count


class OverBudget(RuntimeError):
    """The run needs more memory than its budget; `outcome` has entries for `result.json`."""

    def __init__(self, message: str, **outcome: Any):
        super().__init__(message)
        self.outcome = outcome


def free_bytes(device: torch.device, *, processes: int | None = None) -> int:
    """Free memory of the GPU, or the memory that this process can still allocate on the CPU: its share, of several.

    `processes`: those on this machine, by default those of the launcher or of the (pretended) group.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        if line.startswith("MemAvailable:"):  # includes caches that the system would release
            limits = [1024 * int(line.split()[1])]
    group = Path("/sys/fs/cgroup")
    most, used = (group / name for name in ("memory.max", "memory.current"))
    if most.is_file() and most.read_text().strip().isdigit():
        limits.append(int(most.read_text()) - int(used.read_text()))
    return min(limits) // _processes_here(processes)


def free_host_bytes(device: torch.device, *, folder: Path) -> int:
    """The bytes that this process can keep in host memory (`memory.offload`), as its share, of several.

    For CUDA that is free memory of the host; on the CPU free space on the disk of an existing folder.
    """
    if device.type == "cuda":
        return free_bytes(torch.device("cpu"))
    return shutil.disk_usage(folder).free // _processes_here()


def _processes_here(count: int | None = None) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE") or count or process_count())
