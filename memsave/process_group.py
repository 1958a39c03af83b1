"""The process group of a command that torchrun started several times, and the device of each of its processes.

    torchrun --nproc_per_node=2 -m memsave.predict checkpoint=... input=... output=...

torchrun gives each process RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Objects and numbers travel by
gloo between CPUs; gradients on a GPU travel by NCCL.
"""

import os
from datetime import timedelta

import torch
from torch import distributed

from memsave.config import ConfigError
from memsave.processes import gather, process_count, process_rank, without_group

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process."""
TIMEOUT = timedelta(days=1)
"""One process may wait for another as long as one item takes; torchrun ends the others if a process ends."""


def start_group() -> bool:
    """Start the group of the processes that torchrun started, and return True; False if there is nothing to start.

    A single process needs no group, and a group that exists stays as it is. Raises ConfigError for several processes
    of another launcher, which all would do the same.
    """
    found = without_group()
    if found is None:
        return False
    if not all(name in os.environ for name in VARIABLES) or int(os.environ["WORLD_SIZE"]) < 2:
        raise ConfigError(
            f"{found} without torchrun, and each would write the same files; start one, or several by torchrun, as in "
            f"torchrun --nproc_per_node=2 -m memsave.predict"
        )
    with_cuda = torch.cuda.is_available() and distributed.is_nccl_available()
    distributed.init_process_group("cpu:gloo,cuda:nccl" if with_cuda else "gloo", timeout=TIMEOUT)
    return True


def stop_group() -> None:
    """End the group. Collectives of processes that still wait for this one then fail."""
    distributed.destroy_process_group()


def own_device(device: torch.device, *, key: str = "device") -> torch.device:
    """The device of this process: of several processes, each one on a GPU gets that of its number, LOCAL_RANK.

    Raises ConfigError if a node has more processes than GPUs, or the device names one GPU for all of them.
    """
    if process_count() == 1 or device.type != "cuda":
        return device
    number, gpus = int(os.environ.get("LOCAL_RANK", process_rank())), torch.cuda.device_count()
    if device.index is not None:
        raise ConfigError(f"{key}={device} is one GPU for {process_count()} processes; give {key}=cuda")
    if number >= gpus:
        raise ConfigError(
            f"process {number} of this computer finds no GPU of its own among {gpus}; start at most {gpus} by "
            f"--nproc_per_node, or give {key}=cpu"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def refuse_differences(values: dict[str, object]) -> None:
    """Raise ConfigError on all processes if one of the values differs between them; the keys name them."""
    every = gather(values)
    for rank, other in enumerate(every):
        for key, value in every[0].items():
            if other[key] != value:
                raise ConfigError(
                    f"the processes disagree about {key}: process {rank} differs from process 0; start all of them "
                    f"with the same command, code and data"
                )
