"""`mode=plan`: the sizes and strategies that fit into a budget, before anything is trained.

    python -m memsave.run experiment=brats_rev mode=plan budget=16GiB vary=volume
    python -m memsave.run experiment=brats_rev mode=plan budget=16GiB             # does this config fit?

The training step of the run is taken on fake tensors (see `memsave.profiler.planner`), once with each strategy that the
task compares: the memory modes of a U-Net; for a language model, plain training, one gradient per example, and ghost
clipping. A small real step, once per machine and model family, calibrates what the allocator takes in addition, and
the rates from which the time of a step is predicted.
"""

import datetime
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch

from memsave.config import Config
from memsave.data.cache import cache_root
from memsave.planning.budget import free_host_bytes
from memsave.planning.copies import copy_rates
from memsave.planning.fake_step import fake_step, whole_batch
from memsave.processes import alone, process_count
from memsave.profiler import (
    Calibration,
    MemoryEstimate,
    SearchResult,
    calibrate,
    format_bytes,
    largest,
    parse_bytes,
    peak_on_fake,
)
from memsave.profiler.calibration import TrainingStep, calibration_from, read_calibrations, write_calibration
from memsave.profiler.work import WorkCounter
from memsave.progress import Progress
from memsave.tasks.definition import PER_SAMPLE, Variation, definition_of
from memsave.training.result import hardware, versions
from memsave.training.sharding import wants_sharding


@dataclass(frozen=True)
class Row:
    """The memory that one strategy needs, or the largest size at which it fits."""

    strategy: str
    need: MemoryEstimate
    fits: bool | None
    """None without a budget."""
    seconds: float
    """Mean time of a step on fake tensors."""
    answer: SearchResult | None = None
    """The result of the search with `vary`; None without `vary`."""
    size: str | None = None
    """The largest size that fits, in words; None without `vary`, or if none fits."""
    next_size: str | None = None
    """The next larger size, in words."""
    limit: str | None = None
    """The reason why no larger size was tried; None if one was."""
    step_seconds: float | None = None
    """Predicted time of a logical batch; None without a calibration of times."""

    @property
    def described(self) -> str | None:
        """`size`, with "at least" if the search ended by its time limit."""
        timed_out = self.answer is not None and self.answer.timed_out
        return f"at least {self.size}" if timed_out else self.size

    def as_dict(self) -> dict[str, Any]:
        """The row for `result.json`, with bytes as ints."""
        content = {
            "strategy": self.strategy,
            "fits": self.fits,
            "exact_bytes": self.need.exact,
            "calibrated_bytes": self.need.calibrated,
            "reserve_bytes": self.need.reserve,
            "host_bytes": self.need.host,
            "peak_by_category": self.need.report.peak_by_category,
            "predicted_seconds": self.step_seconds,
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
    """The table of strategies."""

    vary: str | None
    budget: int | None
    rows: list[Row]
    own: Row
    """The row of the strategy of the config."""
    fixed: str = ""
    """The sizes that the plan does not vary, such as 2 at once."""
    processes: str = ""
    """Whose bytes these are, such as each of 8 processes (fsdp); empty for a single process."""
    notes: list[str] = field(default_factory=list)
    """What the numbers do not include, in sentences."""

    def as_dict(self) -> dict[str, Any]:
        """The entry `plan` of `result.json`."""
        return {
            "predicted": "on fake tensors",
            "vary": self.vary,
            **({"processes": self.processes} if self.processes else {}),
            "fixed": self.fixed,
            "budget_bytes": self.budget,
            "strategy": self.own.strategy,
            "notes": self.notes,
            "rows": [row.as_dict() for row in self.rows],
        }


def make_plan(
    config: Config,
    device: torch.device,
    *,
    strategies: list[str] | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Plan:
    """The plan with one row for each of `strategies`, or for each strategy that the task compares.

    folder: of the run, for the files of `memory.offload`.
    """
    progress = progress or Progress()
    if config.trainer.compile and config.memory.engine == "auto":
        config = config.changed({"memory.engine": "hooks"})  # the only engine for compiled blocks
    budget = None if config.budget is None else parse_bytes(config.budget)
    task = definition_of(config)
    rows = []
    for name in strategies or task.strategies():
        if name == PER_SAMPLE and wants_sharding(config.trainer):
            progress.say(f"{name} is left out: it needs whole gradients, and trainer.parallel=fsdp shards them")
            continue
        progress.say(f"planning {name}, on fake tensors")
        rows.append(_row(config, name, budget=budget, device=device, folder=folder, progress=progress))
    own = next(row for row in rows if row.strategy == task.current_strategy())
    notes = [*compile_notes(config), *_host_notes(config, own, device, folder=folder)]
    return Plan(config.vary, budget, rows, own, fixed_sizes(config), _described_processes(config), notes)


def compile_notes(config: Config) -> list[str]:
    """What a plan says of a run that compiles its blocks; `experiments/planning` measures it."""
    if not config.trainer.compile:
        return []
    return [
        "trainer.compile=true is not planned: bytes and time are those of the step without compilation; compiled steps "
        "of the U-Net took less memory on a CPU"
    ]


def _host_notes(config: Config, own: Row, device: torch.device, *, folder: Path | None) -> list[str]:
    where = host_folder(config, folder)
    free = free_host_bytes(device, folder=where) if own.need.host else 0
    return [host_note(own.need.host, free, device, folder=where)] if own.need.host > free else []


def host_note(needed: int, free: int, device: torch.device, *, folder: Path) -> str:
    """The sentence about a plan that keeps more bytes in host memory than are free there."""
    where = "of the host's memory" if device.type == "cuda" else f"on the disk of {folder}"
    return f"memory.offload needs {format_bytes(needed)} in host memory, and {format_bytes(free)} {where} are free"


def host_folder(config: Config, folder: Path | None) -> Path:
    """The existing folder on whose disk a run in `folder` (None: here) keeps what it offloads, on the CPU."""
    given = config.memory.offload_folder
    wanted = (folder or Path() if given is None else Path(given).expanduser()).absolute()
    return next(each for each in (wanted, *wanted.parents) if each.is_dir())


def _described_processes(config: Config) -> str:
    count, sharded = process_count(), wants_sharding(config.trainer)
    return "" if count == 1 else f"each of {count} processes ({'fsdp' if sharded else 'ddp'})"


def variation(config: Config) -> Variation:
    """The variation of `vary=`, with a start within its limits."""
    made = definition_of(config).variations()[str(config.vary)]()
    start = max(made.start, made.low)
    return replace(made, start=start if made.high is None else min(start, made.high))


def fixed_sizes(config: Config) -> str:
    """The sizes that the plan does not vary: examples per micro-batch, and the size of an example."""
    trainer = config.trainer
    share = math.ceil(trainer.batch_size / process_count())
    batch = [] if config.vary == "batch" else [f"{trainer.micro_batch_size or share} at once"]
    definition, offload = definition_of(config), config.memory.offload
    offloaded = [f"{' and '.join(offload)} in host memory"] if offload else []
    return ", ".join([*batch, *definition.fixed_sizes(), *definition.unit_sizes(), *offloaded])


def _row(
    config: Config,
    strategy: str,
    *,
    budget: int | None,
    device: torch.device,
    folder: Path | None,
    progress: Progress,
) -> Row:
    config = definition_of(config).with_strategy(strategy)
    reserve = parse_bytes(config.reserve)
    mixed = config.memory.mode == "auto"
    calibrating = widest_calibration if mixed else partial(calibration_of, strategy=strategy)
    calibration = calibrating(config, device=device, folder=folder, progress=progress)
    started = time.perf_counter()
    if config.vary is None or budget is None:
        work = WorkCounter()
        report = peak_on_fake(partial(_step, config, strategy, device, work=work))
        need = MemoryEstimate(report, calibration.allocator_bytes(report), reserve)
        fits = None if budget is None else need.total <= budget
        taken = time.perf_counter() - started
        return Row(strategy, need, fits, taken, step_seconds=seconds_of(config, work, calibration))
    varied = variation(config)
    works: dict[int, WorkCounter] = {}

    def step_at(size: int) -> TrainingStep:
        works[size] = WorkCounter()
        return _step(varied.at(size), strategy, device, architecture=varied.architecture(size), work=works[size])

    answer = largest(
        step_at,
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
    planned = varied.low if answer.size is None else answer.size
    step_seconds = seconds_of(varied.at(planned), works[planned], calibration)
    return Row(strategy, answer.need, answer.size is not None, seconds, answer, size, above, limit, step_seconds)


def seconds_of(config: Config, work: WorkCounter, calibration: Calibration) -> float | None:
    """The predicted time of a logical batch, from the work of its fake step; None without a calibration of times."""
    return None if calibration.times is None else calibration.times.seconds_of(whole_batch(config, work).values())


def _step(
    config: Config,
    strategy: str,
    device: torch.device,
    *,
    architecture: Mapping[str, Any] | None = None,
    work: WorkCounter | None = None,
) -> TrainingStep:
    per_sample = strategy == PER_SAMPLE
    return fake_step(config, device=device, per_sample_gradients=per_sample, architecture=architecture, work=work)


def widest_calibration(
    config: Config, device: torch.device, *, folder: Path | None = None, progress: Progress
) -> Calibration:
    """The largest workspace among the strategies that bound a config of memory=auto, and the rates of all of them."""
    task = definition_of(config)
    found = [
        calibration_of(task.with_strategy(name), name, device, folder=folder, progress=progress)
        for name in task.memory_strategies()
    ]
    times = [each.times for each in found if each.times is not None]
    merged = reduce(lambda one, other: one.with_kinds_of(other), times) if times else None
    return Calibration(max(each.workspace_ratio for each in found), merged)


def calibration_of(
    config: Config, strategy: str, device: torch.device, *, folder: Path | None = None, progress: Progress
) -> Calibration:
    """The calibration of this machine, from the cache or from a small real step.

    The times of a config that offloads are those of the step without, and the rates of copies. `folder`: of the run.
    """
    if not config.memory.offload:
        return _cached(config, strategy, device, timed=True, progress=progress)
    moved = _cached(config, strategy, device, timed=False, progress=progress)
    times = _cached(config.changed({"memory.offload": []}), strategy, device, timed=True, progress=progress).times
    if times is not None:
        times = times.with_rates(copy_rates(device, folder=host_folder(config, folder)))
    return replace(moved, times=times)


def _cached(config: Config, strategy: str, device: torch.device, *, timed: bool, progress: Progress) -> Calibration:
    path = cache_root() / "calibration.json"
    info = hardware()
    machine = info["gpu"] if device.type == "cuda" else f"{info['cpu']} ({info['threads']} threads)"
    task, memory = definition_of(config), config.memory
    modes = [memory.described, f"engine {memory.engine}"]
    privacy = f"privacy {config.privacy.option}"
    tf32 = ["tf32"] if config.trainer.tf32 and device.type == "cuda" else []
    parts = dict.fromkeys([config.trainer.precision, *tf32, task.family(), strategy, privacy, *modes])
    name = ", ".join([machine, device.type, *parts])
    found = read_calibrations(path).get(name)
    made_by = {each: version for each, version in versions().items() if each != "python"}  # others, other operators
    known = calibration_from(found) if found is not None and made_by.items() <= found.items() else None
    if known is not None and (known.times is not None or not timed):
        return known
    progress.say(f"  calibrating {strategy} by a small real step; the result is cached in {path}")
    small, architecture = task.calibration_config()
    with alone():  # the workspace of operators does not depend on the other processes
        step = partial(_step, small, strategy, device, architecture=architecture)
        calibration = calibrate(step, device=device, timed=timed)
    if calibration is None:
        return Calibration()
    notes = {"date": datetime.date.today().isoformat(), **made_by}
    write_calibration(path, name, calibration, notes=notes)
    return calibration
