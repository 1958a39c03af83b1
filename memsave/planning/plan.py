"""`mode=plan`: what fits into a budget, and how, before anything is trained.

    python -m memsave.run experiment=brats_rev mode=plan budget=16GiB vary=volume
    python -m memsave.run experiment=brats_rev mode=plan budget=16GiB             # does this very config fit?

The run's own training step is taken on fake tensors (see `memsave.profiler.planner`), with every strategy that the task
compares: a U-Net's memory modes, or a language model plain, with one gradient an example, and with ghost clipping.
What the allocator takes beyond that is calibrated once for each machine and family by a small real step.
"""

import datetime
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from memsave.config import Config
from memsave.data.cache import cache_root
from memsave.planning.fake_step import fake_step
from memsave.profiler import Calibration, MemoryEstimate, SearchResult, calibrate, largest, parse_bytes, peak_on_fake
from memsave.profiler.calibration import TrainingStep, read_calibrations, write_calibration
from memsave.progress import Progress
from memsave.tasks.definition import PER_SAMPLE, Variation, definition_of
from memsave.training.result import hardware, versions


@dataclass(frozen=True)
class Row:
    """What one strategy needs, or the largest size at which it fits."""

    strategy: str
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
            "strategy": self.strategy,
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
    """The row of the config's own strategy."""
    fixed: str = ""
    """What every size is for, such as 2 at once."""

    def as_dict(self) -> dict[str, Any]:
        """The entry `plan` of `result.json`."""
        return {
            "predicted": "on fake tensors",
            "vary": self.vary,
            "fixed": self.fixed,
            "budget_bytes": self.budget,
            "strategy": self.own.strategy,
            "rows": [row.as_dict() for row in self.rows],
        }


def make_plan(config: Config, device: torch.device, *, strategies: list[str] | None = None, progress: Progress) -> Plan:
    """The table of the strategies that the task compares (given, of `strategies` alone), its own among them."""
    budget = None if config.budget is None else parse_bytes(config.budget)
    task = definition_of(config)
    rows = []
    for name in task.strategies() if strategies is None else strategies:
        progress.say(f"planning {name}, on fake tensors")
        rows.append(_row(config, name, budget=budget, device=device, progress=progress))
    own = next(row for row in rows if row.strategy == task.current_strategy())
    return Plan(config.vary, budget, rows, own, fixed_sizes(config))


def variation(config: Config) -> Variation:
    """What `vary=` varies, from a start within its limits."""
    made = definition_of(config).variations()[str(config.vary)]()
    start = max(made.start, made.low)
    return replace(made, start=start if made.high is None else min(start, made.high))


def fixed_sizes(config: Config) -> str:
    """What every size of the plan is for: examples at once, and the size of one."""
    trainer = config.trainer
    batch = [] if config.vary == "batch" else [f"{trainer.micro_batch_size or trainer.batch_size} at once"]
    return ", ".join([*batch, *definition_of(config).fixed_sizes()])


def _row(config: Config, strategy: str, *, budget: int | None, device: torch.device, progress: Progress) -> Row:
    config = definition_of(config).with_strategy(strategy)
    reserve = parse_bytes(config.reserve)
    calibration = calibration_of(config, strategy, device, progress=progress)
    started = time.perf_counter()
    if config.vary is None or budget is None:
        report = peak_on_fake(partial(_step, config, strategy, device))
        need = MemoryEstimate(report, calibration.allocator_bytes(report), reserve)
        fits = None if budget is None else need.total <= budget
        return Row(strategy, need, fits, seconds=time.perf_counter() - started)
    varied = variation(config)
    answer = largest(
        lambda size: _step(varied.at(size), strategy, device, architecture=varied.architecture(size)),
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
    return Row(strategy, answer.need, answer.size is not None, seconds, answer, size, above, limit)


def _step(
    config: Config, strategy: str, device: torch.device, *, architecture: Mapping[str, Any] | None = None
) -> TrainingStep:
    return fake_step(config, device=device, per_sample_gradients=strategy == PER_SAMPLE, architecture=architecture)


def calibration_of(config: Config, strategy: str, device: torch.device, *, progress: Progress) -> Calibration:
    """What the allocator takes on this machine beyond the exact bytes: from the cache, or by a small real step now."""
    path = cache_root() / "calibration.json"
    here = hardware()
    machine = here["gpu"] if device.type == "cuda" else f"{here['cpu']} ({here['threads']} threads)"
    task, memory = definition_of(config), config.memory
    kept = dict.fromkeys([config.trainer.precision, task.family(), strategy, memory.mode, f"engine {memory.engine}"])
    name = ", ".join([machine, device.type, *kept])
    found = read_calibrations(path).get(name)
    if found is not None and found.get("torch") == torch.__version__:
        return Calibration(workspace_ratio=found["workspace_ratio"])
    progress.say(f"  calibrating {strategy} by a small real step, once; the result is kept in {path}")
    small, architecture = task.small_config()
    calibration = calibrate(lambda: _step(small, strategy, device, architecture=architecture), device=device)
    if calibration is None:
        return Calibration()
    notes = {"date": datetime.date.today().isoformat(), "torch": versions()["torch"]}
    write_calibration(path, name, calibration, notes=notes)
    return calibration
