"""`memory=auto budget=8GiB`: the fastest strategy to keep activations that fits into a budget, found on fake tensors.

The task lists its choices (`TaskDefinition.memory_choices`): for a U-Net, each level is stored, checkpointed or
reversible, by one of two engines; for a language model, layers are stored or checkpointed, the head forms all logits or
none, and the micro-batch is the largest that fits; each with activations, the optimizer's state or both in host memory.
`search.py` finds the one with the least predicted time. A choice changes neither the function nor the batch, and its
config keys can be set in another run.
"""

import time
from pathlib import Path

import torch

from memsave.config import Config
from memsave.planning.budget import OverBudget
from memsave.planning.plan import compile_notes
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
    chosen, lines = plan_alone(_fastest_that_fits, config, device, folder=folder)
    for line in lines:
        progress.say(line)
    write_config(chosen, folder)
    return chosen


def _fastest_that_fits(config: Config, device: torch.device, *, folder: Path) -> tuple[Config, list[str]]:
    """(the config with the choice, lines about it)."""
    assert config.budget is not None
    started = time.perf_counter()
    found = Search(config, device, parse_bytes(config.budget), folder)
    best = found.fastest()
    if best is None:
        if found.traced:
            found.measure_smallest()
        message = f"no strategy to keep activations fits into {format_bytes(found.budget)}"
        if found.smallest() > found.budget:
            message += f": the smallest one needs a budget of {format_bytes(found.smallest())}, predicted"
        raise OverBudget("; ".join([message, *found.notes()]))
    what, need = definition_of(best.config).describe_memory(), format_bytes(best.need.total)
    seconds = "" if found.times is None else f" and {best.seconds:.3g} s a step"
    line = (
        f"memory=auto: {what}; {need} of {config.budget}{seconds}, predicted; {len(found.trials)} fake steps in "
        f"{time.perf_counter() - started:.1f} s"
    )
    return best.config, [line, *compile_notes(config), *found.notes()]
