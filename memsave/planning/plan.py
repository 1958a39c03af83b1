"""`mode=plan`: what fits into a budget, and how, before anything is trained.

    python -m memsave.run experiment=brats_rev mode=plan budget=16GiB vary=volume
    python -m memsave.run experiment=brats_rev mode=plan budget=16GiB             # does this very config fit?

The run's own training step is taken on fake tensors (see `memsave.profiler.planner`), in every way that the experiment
compares: a U-Net's memory modes, or a language model plain, with one gradient an example, and with ghost clipping.
What the allocator takes beyond that is calibrated once for each machine and family by a small real step.
"""

import datetime
import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from memsave.config.schema import Config, GhostPrivacy, PrivacyConfig, UNetModel
from memsave.data.cache import cache_root
from memsave.planning.fake_step import fake_step
from memsave.planning.variation import Variation, variation, what_is_fixed
from memsave.profiler import Calibration, MemoryEstimate, SearchResult, calibrate, largest, parse_bytes, peak_on_fake
from memsave.profiler.calibration import TrainingStep, read_calibrations, write_calibration
from memsave.progress import Progress
from memsave.training.result import hardware, versions

PER_SAMPLE = "per-example gradients"
LANGUAGE_STRATEGIES = ("plain", PER_SAMPLE, "ghost")
SMALL_CROP, SMALL_LENGTH, SMALL_LAYERS, SMALL_HEADS = 40, 64, 2, 2  # of a calibrating step


@dataclass(frozen=True)
class Row:
    """What one way to train needs, or the largest size at which it fits."""

    way: str
    need: MemoryEstimate
    fits: bool | None
    """None without a budget."""
    seconds: float
    """Of one step on fake tensors, the mean over what was tried."""
    answer: SearchResult | None = None
    """With `vary`."""
    size: str | None = None
    """The largest that fits, for people; without `vary`, or where none fits, None."""
    next_size: str | None = None
    limit: str | None = None
    """Why no larger size was tried, where none was."""

    @property
    def described(self) -> str | None:
        """The largest size in words; "at least" where the search ended by its time."""
        timed_out = self.answer is not None and self.answer.timed_out
        return f"at least {self.size}" if timed_out else self.size

    def as_dict(self) -> dict[str, Any]:
        """The row as it stands in `result.json`; sizes in bytes."""
        content = {
            "way": self.way,
            "fits": self.fits,
            "exact_bytes": self.need.exact,
            "calibrated_bytes": self.need.calibrated,
            "reserve_bytes": self.need.reserve,
            "peak_by_category": self.need.report.peak_by_category,
            "seconds_per_fake_step": round(self.seconds, 3),
        }
        if self.answer is None:
            return content
        above = None if self.answer.above is None else self.answer.above.total
        return {
            **content,
            "size": self.answer.size,
            "described": self.size,
            "timed_out": self.answer.timed_out,
            "limit": self.limit,
            "next": {"described": self.next_size, "total_bytes": above},
            "smallest_budget_bytes": self.answer.smallest_budget,
            "monotone": self.answer.monotone,
            "tried": {str(size): total for size, total in self.answer.tried.items()},
        }


@dataclass(frozen=True)
class Plan:
    """The table."""

    vary: str | None
    budget: int | None
    rows: list[Row]
    own: Row
    """Of the way that the config has."""
    fixed: str = ""
    """What every size is for, such as 2 at once."""

    def as_dict(self) -> dict[str, Any]:
        """The entry `plan` of `result.json`."""
        return {
            "predicted": "on fake tensors",
            "vary": self.vary,
            "fixed": self.fixed,
            "budget_bytes": self.budget,
            "way": self.own.way,
            "rows": [row.as_dict() for row in self.rows],
        }


def make_plan(config: Config, device: torch.device, *, ways: list[str] | None = None, progress: Progress) -> Plan:
    """The table of the ways to train that the config compares, its own among them (`ways`: of these)."""
    budget = None if config.budget is None else parse_bytes(config.budget)
    varied = None if config.vary is None else variation(config)
    rows = []
    for way in strategies_of(config) if ways is None else ways:
        progress.say(f"planning {way}, on fake tensors")
        rows.append(_row(config, way, varied, budget=budget, device=device, progress=progress))
    own = next(row for row in rows if row.way == current_strategy(config))
    return Plan(config.vary, budget, rows, own, what_is_fixed(config))


def strategies_of(config: Config) -> list[str]:
    """The ways to train that are compared."""
    if config.task != "segmentation":
        return [
            current_strategy(config) if way == "ghost" and _is_private(config) else way for way in LANGUAGE_STRATEGIES
        ]
    return list(dict.fromkeys([*config.profiler.compare, config.memory.mode]))


def current_strategy(config: Config) -> str:
    """The config's own way to train, by the name that it has in the table."""
    if config.task == "segmentation":
        return config.memory.mode
    return config.privacy.option if _is_private(config) else "plain"


def _is_private(config: Config) -> bool:
    return isinstance(config.privacy, GhostPrivacy)


def _row(
    config: Config, way: str, varied: Variation | None, *, budget: int | None, device: torch.device, progress: Progress
) -> Row:
    config = with_strategy(config, way)
    reserve = parse_bytes(config.reserve)
    calibration = calibration_of(config, way, device, progress=progress)
    started = time.perf_counter()
    if varied is None or budget is None:
        report = peak_on_fake(partial(_step, config, way, device))
        need = MemoryEstimate(report, calibration.allocator_bytes(report), reserve)
        fits = None if budget is None else need.total <= budget
        return Row(way, need, fits, seconds=time.perf_counter() - started)
    answer = largest(
        lambda size: _step(with_strategy(varied.at(size), way), way, device, architecture=varied.architecture(size)),
        budget=budget,
        reserve=reserve,
        calibration=calibration,
        low=varied.low,
        high=varied.high,
        multiple=varied.multiple,
        start=varied.start,
        power=varied.power,
        seconds=config.profiler.plan_seconds,
    )
    seconds = (time.perf_counter() - started) / len(answer.tried)
    size = None if answer.size is None else varied.describe(answer.size)
    above = None if answer.size is None or answer.above is None else varied.describe(answer.size + varied.multiple)
    limit = None if answer.size is None or answer.above is not None else varied.limit
    if answer.timed_out:
        limit = f"search ended after profiler.plan_seconds={config.profiler.plan_seconds:g}"
    return Row(way, answer.need, answer.size is not None, seconds, answer, size, above, limit)


def with_strategy(config: Config, way: str) -> Config:
    """The config in one of the ways of `strategies_of`."""
    config = deepcopy(config)
    if config.task == "segmentation":
        if way != config.memory.mode:
            config.memory.mode, config.memory.levels = way, None
    elif way in ("plain", PER_SAMPLE):
        config.privacy = PrivacyConfig()
    elif not _is_private(config):
        config.privacy = GhostPrivacy()
    return config


def _step(
    config: Config, way: str, device: torch.device, *, architecture: Mapping[str, Any] | None = None
) -> TrainingStep:
    known = {"per_example_gradients": way == PER_SAMPLE, "architecture": architecture}
    return fake_step(config, device=device, **known)  # type: ignore[arg-type]


def calibration_of(config: Config, way: str, device: torch.device, *, progress: Progress) -> Calibration:
    """What the allocator takes on this machine over the exact bytes: as it is kept, or by a small real step now."""
    path = cache_root() / "calibration.json"
    here = hardware()
    machine = here["gpu"] if device.type == "cuda" else f"{here['cpu']} ({here['threads']} threads)"
    memory, model = config.memory, config.model
    family = f"{model.kind} {'-'.join(map(str, model.channels))}" if isinstance(model, UNetModel) else model.kind
    kept = dict.fromkeys([config.trainer.precision, family, way, memory.mode, f"engine {memory.engine}"])
    name = ", ".join([machine, device.type, *kept])
    found = read_calibrations(path).get(name)
    if found is not None and found.get("torch") == torch.__version__:
        return Calibration(workspace_ratio=found["workspace_ratio"])
    progress.say(f"  calibrating {way} by a small real step, once; it is then kept in {path}")
    small, architecture = _small(config)
    calibration = calibrate(lambda: _step(small, way, device, architecture=architecture), device=device)
    if calibration is None:
        return Calibration()
    notes = {"date": datetime.date.today().isoformat(), "torch": versions()["torch"]}
    write_calibration(path, name, calibration, notes=notes)
    return calibration


def _small(config: Config) -> tuple[Config, dict[str, Any]]:
    """The config at a size whose real step takes a second, and what changes in a language model's architecture."""
    config = deepcopy(config)
    if config.task == "segmentation":
        config.trainer.batch_size, config.trainer.micro_batch_size = 1, None
        config.data.crops_per_case = 1
        config.data.crop_size = [SMALL_CROP] * len(config.data.crop_size)  # of any config: kernels differ with the size
        config.model.blocks = [1] * len(config.model.blocks)
        return config, {}
    from memsave.planning.variation import wider
    from memsave.tasks.language.pretrained import language_config

    micro = 1 if config.privacy.option == "direct" else None
    config.trainer.batch_size, config.trainer.micro_batch_size = 2, micro
    found = language_config(config.model)
    heads = min(SMALL_HEADS, found.num_attention_heads)
    config.data.max_length = min(config.data.max_length, SMALL_LENGTH)
    width = heads * (found.hidden_size // found.num_attention_heads)
    return config, {"num_hidden_layers": min(SMALL_LAYERS, found.num_hidden_layers), **wider(found, width)}
