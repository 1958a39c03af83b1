"""Budgets: what is free here, and steps that hold more memory than the run may (`budget=16GiB`)."""

import os
from pathlib import Path
from typing import Any

import torch


class OverBudget(RuntimeError):
    """More than the budget; the message says what to do, and `outcome` stands in the run's result."""

    def __init__(self, message: str, **outcome: Any):
        super().__init__(message)
        self.outcome = outcome


def free_bytes(device: torch.device) -> int:
    """What is free on the device: of a GPU, or of the memory that this process may have on the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        if line.startswith("MemAvailable:"):  # which also counts caches that the system would give back
            limits = [1024 * int(line.split()[1])]
    group = Path("/sys/fs/cgroup")
    most, used = (group / name for name in ("memory.max", "memory.current"))
    if most.is_file() and most.read_text().strip().isdigit():
        limits.append(int(most.read_text()) - int(used.read_text()))
    return min(limits)
