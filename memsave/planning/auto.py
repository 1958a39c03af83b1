"""`memory=auto budget=8GiB`: the fastest strategy to keep activations that fits into a budget, found on fake tensors.

The task lists its choices by cost (`TaskDefinition.memory_choices`): for a U-Net, each level is stored or reversible;
for a language model, layers are stored or checkpointed, the head forms all logits or none, and the micro-batch is the
largest that fits. The cost of a choice is the number of FLOPs that it computes twice. The first choice that fits is
used. The last choices also keep activations, and then the optimizer's state, in host memory. A choice changes neither
the function nor the batch, and its config keys can be set in another run.
"""

from functools import partial
from pathlib import Path

import torch

from memsave.config import Config
from memsave.planning.budget import OverBudget
from memsave.planning.fake_step import fake_step
from memsave.planning.plan import calibration_of
from memsave.planning.pretend import plan_alone
from memsave.profiler import (
    Calibration,
    MemoryEstimate,
    TrainingStep,
    format_bytes,
    largest,
    parse_bytes,
    peak_on_fake,
)
from memsave.progress import Progress
from memsave.tasks.definition import definition_of
from memsave.training.result import write_config


def choose_memory(config: Config, folder: Path, device: torch.device, *, progress: Progress) -> Config:
    """The config with the choice for `memory=auto`, also written to the folder; other configs are returned unchanged.

    Raises OverBudget with the smallest sufficient budget if no choice fits.
    """
    if config.memory.mode != "auto" or config.memory.levels is not None:
        return config
    chosen, line = plan_alone(_cheapest_that_fits, config, device)
    progress.say(line)
    write_config(chosen, folder)
    return chosen


def _cheapest_that_fits(config: Config, device: torch.device) -> tuple[Config, str]:
    """(the config with the choice, a line about it)."""
    assert config.budget is not None
    budget, smallest = parse_bytes(config.budget), []
    for choice in definition_of(config).all_memory_choices(device):
        calibration = _calibration(choice, device, progress=Progress())
        chosen, estimate = _fit(choice, device, calibration, budget=budget)
        smallest.append(estimate.total)
        if chosen is not None:
            what, need = definition_of(chosen).describe_memory(), format_bytes(estimate.total)
            return chosen, f"memory=auto: {what}; {need} predicted of {config.budget}"
    raise OverBudget(
        f"no strategy to keep activations fits into {format_bytes(budget)}: the smallest one needs a budget of "
        f"{format_bytes(min(smallest))}, predicted"
    )


def _calibration(config: Config, device: torch.device, *, progress: Progress) -> Calibration:
    """The largest calibration among the strategies that bound the config."""
    task = definition_of(config)
    found = (
        calibration_of(task.with_strategy(name), name, device, progress=progress) for name in task.memory_strategies()
    )
    return max(found, key=lambda each: each.workspace_ratio)


def _fit(
    config: Config, device: torch.device, calibration: Calibration, *, budget: int
) -> tuple[Config | None, MemoryEstimate]:
    """(the config with the largest micro-batch that fits, or None; its memory estimate)."""
    if not definition_of(config).plans_micro_batch:
        report = peak_on_fake(partial(fake_step, config, device=device))
        need = MemoryEstimate(report, calibration.allocator_bytes(report), parse_bytes(config.reserve))
        return (config if need.total <= budget else None), need

    def at(size: int) -> Config:
        return config.changed({"trainer.micro_batch_size": size})

    def step_at(size: int) -> TrainingStep:
        return fake_step(at(size), device=device)

    most = 1 if config.privacy.option == "direct" else config.trainer.batch_size
    answer = largest(step_at, low=1, high=most, budget=budget, reserve=config.reserve, calibration=calibration)
    return (None if answer.size is None else at(answer.size)), answer.need
