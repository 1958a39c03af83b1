"""`privacy.memory_budget=auto`: the spare memory of a private step, for logits and gradients that save time.

The step is planned once with nothing kept and once with everything kept that could be. The run then gets what the
budget leaves, or, without one, what is left of SHARE of the free memory, at most what the second step kept. Results do
not depend on it beyond rounding, so a run that is continued may choose again.
"""

from pathlib import Path
from typing import Any

import torch

from memsave.config import Config
from memsave.ghost.owners import clipper_of
from memsave.planning.fake_step import fake_step
from memsave.planning.pretend import plan_alone
from memsave.planning.search import Search
from memsave.profiler import format_bytes, parse_bytes, peak_on_fake
from memsave.progress import Progress
from memsave.training.result import write_config

SHARE = 0.8  # of the free memory, which other programs use, too
ALL = 2**62  # bytes: more than any step could keep


def choose_kept(config: Config, folder: Path, device: torch.device, *, free: int, progress: Progress) -> Config:
    """The config with the choice for `privacy.memory_budget=auto`, also written to the folder; others are unchanged.

    `free`: bytes of free memory, the least of all processes. With `vary`, the largest size leaves nothing to keep.
    """
    if getattr(config.privacy, "memory_budget", None) != "auto":
        return config
    if config.vary:
        chosen, line = with_kept(config, 0), f"0B, because vary={config.vary} takes the whole budget"
    else:
        chosen, line = plan_alone(_chosen, config, device, free=free, folder=folder)
    progress.say(f"privacy.memory_budget=auto: {line}")
    write_config(chosen, folder)
    return chosen


def with_kept(config: Config, count: int) -> Config:
    """The config with a number of bytes as its `privacy.memory_budget`."""
    return config.changed({"privacy.memory_budget": f"{count}B"})


def _chosen(config: Config, device: torch.device, *, free: int, folder: Path) -> tuple[Config, str]:
    """(the config with the choice, a line about it)."""
    whole = int(SHARE * free) if config.budget is None else parse_bytes(config.budget)
    need = Search(config, device, whole, folder).trial(with_kept(config, 0)).need.total
    usable = _usable(with_kept(config, ALL), device)
    kept = max(0, min(whole - need, usable))
    limit = f"{SHARE:.0%} of the free memory" if config.budget is None else "the budget"
    return with_kept(config, kept), (
        f"{format_bytes(kept)} of {format_bytes(usable)} that could be kept; the step takes {format_bytes(need)} "
        f"without, predicted, of {format_bytes(whole)}, {limit}"
    )


def _usable(config: Config, device: torch.device) -> int:
    """The bytes that a step keeps where its memory budget has no limit."""
    found: list[Any] = []

    def make() -> Any:
        step = fake_step(config, device=device)
        found.extend(clipper_of(p) for p in step.model.parameters() if p.requires_grad)
        return step

    peak_on_fake(make)
    return next((clipper.kept_bytes for clipper in found if clipper is not None), 0)
