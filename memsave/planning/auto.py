"""`memory=auto budget=8GiB`: the fastest strategy to keep activations that fits into a budget, found on fake tensors.

The task lists its choices (`TaskDefinition.memory_choices`): for a U-Net, each level is stored, checkpointed or
reversible, by one of two engines; for a language model, layers are stored or checkpointed, the head forms all logits or
none, and the micro-batch is the largest that fits. `search.py` finds the one with the least predicted time. If none
fits, activations, and then the optimizer's state, are kept in host memory. A choice changes neither the function nor
the batch, and its config keys can be set in another run.
"""

import time
from pathlib import Path

import torch

from memsave.config import Config
from memsave.planning.budget import OverBudget
from memsave.planning.pretend import plan_alone
from memsave.planning.search import Search
from memsave.profiler import format_bytes, parse_bytes
from memsave.progress import Progress
from memsave.tasks.definition import definition_of
from memsave.training.result import write_config


def choose_memory(config: Config, folder: Path, device: torch.device, *, progress: Progress) -> Config:
    """The config with the choice for `memory=auto`, also written to the folder; other configs are returned unchanged.

    Raises OverBudget with the smallest sufficient budget if no choice fits.
    """
    if config.memory.mode != "auto" or config.memory.levels is not None:
        return config
    chosen, line = plan_alone(_fastest_that_fits, config, device)
    progress.say(line)
    write_config(chosen, folder)
    return chosen


def _fastest_that_fits(config: Config, device: torch.device) -> tuple[Config, str]:
    """(the config with the choice, a line about it)."""
    assert config.budget is not None
    started = time.perf_counter()
    task, found = definition_of(config), Search(config, device, parse_bytes(config.budget))
    rounds = task.memory_choices(device)
    if task.plans_micro_batch:
        best = found.by_micro_batch([choice for choices in rounds for choice in choices])
    else:
        best = found.by_parts(rounds)
        if best is None:
            found.measure_smallest(rounds)
    best = best or found.first_that_fits(task.offloaded_choices(rounds[-1][-1]))
    if best is None:
        raise OverBudget(
            f"no strategy to keep activations fits into {format_bytes(found.budget)}: the smallest one needs a budget "
            f"of {format_bytes(found.smallest())}, predicted"
        )
    what, need = definition_of(best.config).describe_memory(), format_bytes(best.need.total)
    seconds = "" if found.times is None else f" and {best.seconds:.3g} s a step"
    return best.config, (
        f"memory=auto: {what}; {need} of {config.budget}{seconds}, predicted; {len(found.trials)} fake steps in "
        f"{time.perf_counter() - started:.1f} s"
    )
