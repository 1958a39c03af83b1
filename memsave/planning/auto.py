"""`memory=auto budget=8GiB`: the fastest way to train in a budget, found on fake tensors.

Of a U-Net each level is stored or reversible; of a language model the layers are stored or checkpointed, the head
takes logits or none, and the micro-batch is the largest that fits. What a choice costs are the FLOPs that it evaluates
once more. Choices are tried in the order of their costs, and the first that fits is taken: neither the function nor
the batch changes. The outcome is plain config, and can be passed back in.
"""

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from memsave.config.schema import Config
from memsave.planning.budget import OverBudget
from memsave.planning.fake_step import dummy_task, fake_model, fake_step
from memsave.planning.plan import calibration_of, current_strategy, with_strategy
from memsave.profiler import (
    Calibration,
    MemoryEstimate,
    SearchResult,
    TrainingStep,
    format_bytes,
    largest,
    parse_bytes,
    peak_on_fake,
)
from memsave.progress import Progress
from memsave.training.result import write_config


class Flops(TorchDispatchMode):
    """Counts floating-point operations of matrix products and convolutions, of real tensors or fake ones."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run the operator, and add what it takes."""
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def level_flops(config: Config, device: torch.device) -> list[int]:
    """FLOPs of the forward of each level's blocks, on the way down and up: what rebuilding them adds to a step."""
    totals = [0] * len(config.model.channels)
    with FakeTensorMode(), device, torch.no_grad(), Flops() as flops:
        model, batch = fake_model(config), dummy_task(config, device=device).batch
        for way in (model.encoder, model.decoder):
            for level, blocks in enumerate(way):  # type: ignore[arg-type]
                blocks.register_forward_pre_hook(lambda *_, level=level: _add(totals, level, -flops.total))
                blocks.register_forward_hook(lambda *_, level=level: _add(totals, level, flops.total))
        model(batch["image"].flatten(0, 1) if batch["image"].dim() == 6 else batch["image"])
    return totals


def _add(totals: list[int], level: int, amount: int) -> None:
    totals[level] += amount


def choose_memory(config: Config, folder: Path, device: torch.device, *, progress: Progress) -> Config:
    """The config with all that `memory=auto` leaves open, written into the folder; as it is where nothing is open.

    Raises OverBudget, with the smallest budget that would do, where no way fits.
    """
    if config.memory.mode != "auto" or config.memory.levels is not None:
        return config
    assert config.budget is not None
    images = config.task == "segmentation"
    budget, reserve, least = parse_bytes(config.budget), parse_bytes(config.reserve), []
    for candidate in in_order(config, device) if images else texts_in_order(config, device):
        ways = ("stored", "reversible") if images else (current_strategy(candidate),)
        calibration = max(
            (calibration_of(with_strategy(candidate, way), way, device, progress=progress) for way in ways),
            key=lambda each: each.workspace_ratio,
        )
        if images:
            report = peak_on_fake(partial(fake_step, candidate, device=device))
            need = MemoryEstimate(report, calibration.allocator_bytes(report), reserve)
            fits = need.total <= budget
        else:
            answer = _largest_micro_batch(candidate, device, calibration)
            need, fits = answer.need, answer.size is not None
            candidate.trainer.micro_batch_size = answer.size
        least.append(need.total)
        if fits:
            progress.say(f"memory=auto: {told(candidate)}; {format_bytes(need.total)} predicted of {config.budget}")
            write_config(candidate, folder)
            return candidate
    raise OverBudget(
        f"no way to keep activations fits into {format_bytes(budget)}: the least needs a budget of "
        f"{format_bytes(min(least))}, predicted"
    )


def told(config: Config) -> str:
    """What was chosen, as overrides."""
    if config.task == "segmentation":
        return f"memory.levels=[{','.join(config.memory.levels or ())}]"
    model, trainer = config.model, config.trainer
    return f"memory={config.memory.mode} model.head={model.head} trainer.micro_batch_size={trainer.micro_batch_size}"


def _largest_micro_batch(config: Config, device: torch.device, calibration: Calibration) -> SearchResult:
    def step_at(size: int) -> TrainingStep:
        config.trainer.micro_batch_size = size
        return fake_step(config, device=device)

    known = {"budget": config.budget, "reserve": config.reserve, "calibration": calibration}
    most = 1 if config.privacy.option == "direct" else config.trainer.batch_size
    return largest(step_at, low=1, high=most, **known)  # type: ignore[arg-type]


def texts_in_order(config: Config, device: torch.device) -> list[Config]:
    """Every choice of checkpoints and head, by the FLOPs that it adds to stored layers and a head of logits."""
    with FakeTensorMode(), device, torch.no_grad(), Flops() as flops:
        model: Any = fake_model(_text_choice(config, "stored", "logits"))
        model(torch.zeros(1, config.data.max_length, dtype=torch.long))
    vocabulary, width = model.get_output_embeddings().weight.shape
    head = 2 * config.data.max_length * vocabulary * width
    again = flops.total - head
    added = {"stored": 0, "checkpoint": again, "reversible": again, "logits": 0, "chunked": head}
    modes = ("stored", "checkpoint", "reversible") if hasattr(model, "memory") else ("stored", "checkpoint")
    ways = product(modes, ("logits", "chunked"))
    choices = sorted(ways, key=lambda way: sum(added[each] for each in way))
    return [_text_choice(config, mode, head) for mode, head in choices]


def _text_choice(config: Config, mode: str, head: str) -> Config:
    config = deepcopy(config)
    config.memory.mode, config.model.head = mode, head
    return config


def in_order(config: Config, device: torch.device) -> list[Config]:
    """Every choice of a mode for each level, by the FLOPs that it adds to the stored network's."""
    extra = level_flops(with_levels(config, ["stored"] * len(config.model.channels)), device)

    def added(choice: tuple[str, ...]) -> int:
        return sum(more for mode, more in zip(choice, extra, strict=True) if mode == "reversible")

    choices = sorted(product(("stored", "reversible"), repeat=len(extra)), key=added)
    return [with_levels(config, choice) for choice in choices]


def with_levels(config: Config, levels: Sequence[str]) -> Config:
    """The config with these modes of its levels."""
    config = deepcopy(config)
    config.memory.levels = list(levels)
    return config
