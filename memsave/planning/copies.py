"""The rates of copies to host memory and back (`memory.offload`) on this machine, measured by such copies.

On the CPU host memory is a file of a folder's disk, mapped into memory. What is measured is the rate at which the
system takes the bytes into its cache. If a step offloads more than fits there, the disk is slower than predicted.
"""

from functools import cache
from pathlib import Path

import torch

from memsave.host_bytes import TO_DEVICE, TO_HOST
from memsave.offload.transfers import Transfers
from memsave.profiler.seconds import Rate, step_clock

SMALL, LARGE = 1 << 16, 1 << 24
"""Bytes of the copies: the smallest storage that is offloaded, and one that malloc need not map anew."""
ROUNDS = 4
"""The first ones also allocate host memory, which later steps of a run find allocated."""


@cache
def copy_rates(device: torch.device, *, folder: Path) -> dict[str, Rate]:
    """The rates of both directions, by kind of work, measured once; `folder`: of the file, on the CPU."""
    clock, transfers = step_clock(device), Transfers(device, folder=folder, waiting_bytes=0)
    least: dict[tuple[str, int], float] = {}
    sources = {size: torch.ones(size, dtype=torch.uint8, device=device) for size in (SMALL, LARGE)}
    blocks = {size: transfers.allocate(source) for size, source in sources.items()}

    def finished(started: float, direction: str, size: int) -> None:
        transfers.synchronize()
        taken = clock() - started
        least[direction, size] = min(taken, least.get((direction, size), taken))

    for _ in range(ROUNDS):
        for size, source in sources.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            started = clock()
            transfers.to_host(source, blocks[size])
            finished(started, TO_HOST, size)
            started = clock()
            transfers.to_device(blocks[size], like=source)
            finished(started, TO_DEVICE, size)
        transfers.release_all()
    return {direction: _line(least[direction, SMALL], least[direction, LARGE]) for direction in (TO_HOST, TO_DEVICE)}


def _line(small: float, large: float) -> Rate:
    """The rates per call and per byte, from the seconds of the two sizes."""
    per_byte = max(0.0, large - small) / (LARGE - SMALL)
    return max(0.0, small - per_byte * SMALL), 0.0, per_byte
