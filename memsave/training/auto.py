"""`memory=auto budget=8GiB`: the fastest way to keep activations that fits, found on fake tensors.

Of a U-Net each level is stored or reversible; what a level costs when it is reversible is the FLOPs of evaluating it
once more. Ways are tried in the order of their FLOPs, and the first whose step fits is taken: neither the function nor
the batch changes. The outcome is plain config, `memory.levels`, and can be passed back in.
"""

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from itertools import product
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from memsave.config import Config
from memsave.profiler import Need, format_bytes, parse_bytes, peak_on_fake
from memsave.training.blank import blank_model, blank_step, blank_task
from memsave.training.budget import OverBudget
from memsave.training.plan import calibration_of
from memsave.training.progress import Progress


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
        model, batch = blank_model(config), blank_task(config, device=device).batch
        for way in (model.encoder, model.decoder):
            for level, blocks in enumerate(way):  # type: ignore[arg-type]
                blocks.register_forward_pre_hook(lambda *_, level=level: _add(totals, level, -flops.total))
                blocks.register_forward_hook(lambda *_, level=level: _add(totals, level, flops.total))
        model(batch["image"].flatten(0, 1) if batch["image"].dim() == 6 else batch["image"])
    return totals


def _add(totals: list[int], level: int, amount: int) -> None:
    totals[level] += amount


def resolved(config: Config, device: torch.device, *, progress: Progress) -> Config:
    """The config with `memory.levels` chosen; as it is where nothing is to be chosen.

    Raises OverBudget, with the smallest budget that would do, where no way fits.
    """
    if config.memory.mode != "auto" or config.memory.levels is not None:
        return config
    assert config.budget is not None
    budget, needs = parse_bytes(config.budget), []
    calibration = calibration_of(with_levels(config, _all(config, "reversible")), "auto", device, progress=progress)
    for levels in in_order(config, device):
        candidate = with_levels(config, levels)
        report = peak_on_fake(partial(blank_step, candidate, device=device))
        need = Need(report, calibration.allocator_bytes(report), parse_bytes(config.reserve))
        needs.append(need.total)
        if need.total <= budget:
            told = ", ".join(levels)
            progress.say(
                f"memory=auto: memory.levels=[{told}], {format_bytes(need.total)} predicted of {config.budget}"
            )
            return candidate
    raise OverBudget(
        f"no way to keep activations fits into {format_bytes(budget)}: the least needs a budget of "
        f"{format_bytes(min(needs))}, predicted"
    )


def in_order(config: Config, device: torch.device) -> list[tuple[str, ...]]:
    """Every choice of a mode for each level, by the FLOPs that it adds to the stored network's."""
    extra = level_flops(with_levels(config, _all(config, "stored")), device)

    def added(choice: tuple[str, ...]) -> int:
        return sum(more for mode, more in zip(choice, extra, strict=True) if mode == "reversible")

    return sorted(product(("stored", "reversible"), repeat=len(extra)), key=added)


def with_levels(config: Config, levels: Sequence[str]) -> Config:
    """The config with these modes of its levels."""
    config = deepcopy(config)
    config.memory.levels = list(levels)
    return config


def _all(config: Config, mode: str) -> list[str]:
    return [mode] * len(config.model.channels)
