"""The start of a run of several processes: equal weights and data in all of them, and random numbers of their own."""

import torch
from torch import nn

from memsave.process_group import refuse_differences
from memsave.processes import broadcast_model, own_seed, process_count, process_rank
from memsave.training.task import Task


def start_alike(model: nn.Module, task: Task, *, seed: int) -> None:
    """Give the model of rank 0 to all processes, check that all have the same data, and seed dropout in each.

    Raises ConfigError on all processes if their data differ. Does nothing in a single process.
    """
    if process_count() == 1:
        return
    shapes = [(name, tuple(each.shape), str(each.dtype)) for name, each in model.state_dict().items()]
    refuse_differences({"the training data": task.fingerprint, "the model's parameters": shapes})
    broadcast_model(model)
    if process_rank() > 0:
        torch.manual_seed(own_seed(seed))
