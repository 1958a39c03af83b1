"""How many processes train together. memsave trains in one, and refuses to be one of several."""

import os

from torch import distributed

LAUNCHERS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Where torchrun, mpirun and srun write the number of processes that they started."""


def several_processes() -> str | None:
    """One sentence's beginning where this process is one of several; None where it is alone."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return f"this process is one of {distributed.get_world_size()} of a process group"
    for name in LAUNCHERS:
        number = os.environ.get(name, "")
        if number.isdigit() and int(number) > 1:
            return f"this process is one of several ({name}={number})"
    return None
