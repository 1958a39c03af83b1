"""Detection of several training processes, which memsave refuses: it trains in one process."""

import os

from torch import distributed

LAUNCHERS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Environment variables in which torchrun, mpirun and srun give the number of processes."""


def several_processes() -> str | None:
    """The beginning of an error message if this process is one of several; None if it is the only one."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return f"this process is one of {distributed.get_world_size()} of a process group"
    for name in LAUNCHERS:
        number = os.environ.get(name, "")
        if number.isdigit() and int(number) > 1:
            return f"this process is one of several ({name}={number})"
    return None
