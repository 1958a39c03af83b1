"""From a config to a folder of results: what `python -m memsave.run` does once the config is composed."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from memsave.config import Config, ConfigError
from memsave.data import DataError
from memsave.planning.auto import choose_memory
from memsave.planning.budget import OverBudget, free_bytes, over_budget
from memsave.planning.compare import compare_modes
from memsave.planning.fit import fit_to_budget, plan_experiment
from memsave.profiler import MemoryRecorder, MemoryReport, format_bytes, parse_bytes, plot_reports, write_html
from memsave.progress import Progress
from memsave.tasks.definition import definition_of
from memsave.training import checkpoint
from memsave.training.log import RunLog
from memsave.training.loop import State, StepResult, averaged, make_state, run_steps
from memsave.training.measure import PLAIN, Measurement
from memsave.training.private import EpsilonMonitor, describe, make_private, privacy_result, round_up, write_statement
from memsave.training.process import process_bytes, process_peak, reset_process_peak, return_freed_memory
from memsave.training.signals import stop_requested
from memsave.training.task import Task


def run_experiment(
    config: Config, folder: Path, *, strategies: list[str] | None = None, progress: Progress
) -> dict[str, Any]:
    """Train, evaluate, measure and draw into `folder`; returns what stands in `result.json` of it.

    With `mode=plan`, plan the strategies that the task compares (or `strategies` alone) instead, and return `plan`.
    """
    if config.profiler.process and not return_freed_memory():
        progress.say("malloc is not glibc's: what the process takes will look larger than what it holds")
    device = choose_device(config.trainer.device)
    if config.trainer.precision == "float16" and device.type != "cuda":
        raise ConfigError("trainer.precision=float16 is for CUDA; give trainer.precision=bfloat16 on the CPU")
    if config.budget == "auto":
        config = config.changed({"budget": str(free_bytes(device))})
    config = choose_memory(config, folder, device, progress=progress)
    if config.mode == "plan":
        return plan_experiment(config, folder, device, strategies=strategies, progress=progress)
    config, planned = fit_to_budget(config, folder, device, progress=progress)
    config, state, task = _prepared(config, device, progress=progress)
    try:
        return planned | _trained(config, state, task, folder, progress=progress)
    except BaseException as error:
        spent = privacy_result(config, state.private, unit=task.unit)
        with suppress(OSError):  # a full disk may be what went wrong
            write_statement(spent, folder)
        error.outcome = {**planned, "privacy": spent, **getattr(error, "outcome", {})}  # type: ignore[attr-defined]
        raise


def _trained(config: Config, state: State, task: Task, folder: Path, *, progress: Progress) -> dict[str, Any]:
    """Take the steps, release the model, and then evaluate, measure and draw, whose faults cost no step."""
    log = RunLog(folder, tensorboard=config.trainer.tensorboard, step=state.step)
    first = _evaluate_first(config, state, task, log, progress=progress)
    measured = compare_modes(config, state, task, progress=progress)
    watch = MemoryMonitor(state, steps=config.profiler.record_steps, budget=config.budget)
    try:
        loss = _train(config, state, task, folder, log=log, watch=watch, progress=progress)
    except OverBudget as stop:
        stop.outcome = {"memory": _write_memory(config, folder, watch.last, measured)}
        raise
    _release(state, task, folder)
    spent = privacy_result(config, state.private, unit=task.unit)
    write_statement(spent, folder)
    scores = _evaluate_last(state, task, log, progress=progress)
    memory = _write_memory(config, folder, watch.worst, measured)
    if watch.process_peak is not None:
        memory |= {"process_peak_bytes": watch.process_peak, "process_start_bytes": watch.process_start}
        start = format_bytes(watch.process_start or 0)
        progress.say(f"Most memory of the process while it trained: {format_bytes(watch.process_peak)}, {start} before")
    task.show(folder)
    for line in _last_lines(config, task, scores, measured, memory):
        progress.say(line)
    if spent is not None:
        progress.say(describe(spent))
    return {
        "data": task.counts,
        "metrics": {"loss": loss, **scores, **first},
        "seconds_per_step": median(watch.seconds) if watch.seconds else None,
        "memory": memory,
        "privacy": spent,
    }


def _release(state: State, task: Task, folder: Path) -> None:
    """Write `model/`."""
    with averaged(state):
        task.release(state.model, folder / "model")


def _prepared(config: Config, device: torch.device, *, progress: Progress) -> tuple[Config, State, Task]:
    """(the config with its number of steps; model, optimizer and clipping where training starts; the task).

    Training starts before the first step, or where `trainer.resume` left off.
    """
    torch.manual_seed(config.trainer.seed)
    progress.say(f"data={config.data.kind}, memory={config.memory.mode}, privacy={config.privacy.option}, on {device}")
    model, tokenizer = make_model(config, progress=progress)
    task, model = make_task(config, device, tokenizer, progress=progress), model.to(device)
    progress.say(task.describe_counts())
    config = config.changed({"trainer.steps": config.trainer.steps_for(task.size), "trainer.epochs": None})
    trainer = config.trainer
    private = make_private(config, model, task, progress=progress)
    state = make_state(model, trainer, private=private)
    state.identity = {
        "trainer.batch_size": trainer.batch_size,
        "trainer.seed": trainer.seed,
        "set of training data": task.fingerprint,
    }
    if trainer.resume:
        checkpoint.load(state, Path(trainer.resume).expanduser())
        if state.step > trainer.steps:
            raise ConfigError(f"trainer.steps is {trainer.steps}, but the checkpoint is at step {state.step}")
        progress.say(f"continuing after step {state.step} of {trainer.steps}")
    return config, state, task


def choose_device(name: str, *, key: str = "trainer.device") -> torch.device:
    """The device that `key` names."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{key} is {name!r}; give auto, cpu, cuda or cuda:NUMBER") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{key} is {name!r}; give auto, cpu, cuda or cuda:NUMBER")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{key} is {name!r}, but PyTorch finds no GPU here; give {key}=cpu")
    return device


def make_model(config: Config, *, progress: Progress | None = None) -> tuple[nn.Module, Any]:
    """(the config's model in its memory mode, on the CPU; its tokenizer or None)."""
    return definition_of(config).make_model(progress=progress or Progress())


def make_task(config: Config, device: torch.device, tokenizer: Any = None, *, progress: Progress | None = None) -> Task:
    """The config's task with its data."""
    return definition_of(config).make_task(device, tokenizer, progress=progress or Progress())


class MemoryMonitor:
    """Records the first steps of a run, under a budget all of them, and keeps the report of the largest."""

    def __init__(self, state: State, *, steps: int, budget: str | None):
        self.state = state
        self.until = state.step + steps
        self.budget = None if budget is None else parse_bytes(budget)
        self.first: MemoryReport | None = None
        self.last: MemoryReport | None = None
        self.worst: MemoryReport | None = None
        self.process_start: int | None = None
        self.process_peak: int | None = None
        self.seconds: list[float] = []  # of each step

    def __call__(self, step: int) -> AbstractContextManager:
        """What surrounds step number `step`."""
        return self._record() if step <= self.until or self.budget is not None else nullcontext()

    def excess(self, step: int) -> str | None:
        """What to say of the last step if it was above the budget."""
        if self.budget is None or self.last is None:
            return None
        found = over_budget(self.last, first=self.first, budget=self.budget, step=step)
        self.first = self.first or self.last
        return found

    @contextmanager
    def _record(self) -> Iterator[None]:
        with MemoryRecorder(self.state.model, optimizer=self.state.optimizer) as recorder:
            yield
        report = self.last = recorder.report()
        if self.worst is None or report.peak_bytes > self.worst.peak_bytes:
            self.worst = report


def _evaluate_first(config: Config, state: State, task: Task, log: RunLog, *, progress: Progress) -> dict[str, float]:
    """The scores before the first step, by names that end in _before."""
    if not config.trainer.evaluate_first or state.step:
        return {}
    progress.say("evaluating before training")
    before = {f"{name}_before": score for name, score in task.evaluate(state.model).items()}
    log.write({"step": state.step, **before})
    return before


def _train(
    config: Config, state: State, task: Task, folder: Path, *, log: RunLog, watch: MemoryMonitor, progress: Progress
) -> float | None:
    """Take the steps, log them, leave checkpoints; returns the last loss, None where no step was left to take."""
    trainer = config.trainer
    loss: float | None = None
    epsilon_monitor = EpsilonMonitor(state.private, steps=trainer.steps)
    if config.profiler.process:
        reset_process_peak()
        watch.process_start = process_bytes()
    with progress.bar(trainer.steps, done=state.step) as bar, stop_requested() as stopping:
        for done in _kept_on_fault(
            run_steps(state, task, trainer, workers=config.data.workers, watch=watch), state, folder
        ):
            loss, spent = done.loss, epsilon_monitor.metrics()
            log.write({**asdict(done), **spent})
            watch.seconds.append(done.seconds)
            what = "an empty batch" if loss is None else f"loss {loss:.3f}"
            bar.advance(what + "".join(f", epsilon {round_up(value, '.2f')}" for value in spent.values()))
            stop, excess, last = stopping(), watch.excess(done.step), done.step == trainer.steps
            evaluate = bool(trainer.evaluate_every) and done.step % trainer.evaluate_every == 0 and not last
            if done.step % trainer.checkpoint_every == 0 or last or stop or excess or evaluate:
                checkpoint.save(state, folder / "checkpoint")  # before an evaluation: its faults cost no steps
            if stop:
                _release(state, task, folder)
                raise KeyboardInterrupt
            if excess:
                raise OverBudget(excess)
            if not evaluate:
                continue
            hopeful = _evaluate(config, state, task, log)
            if trainer.patience:
                checkpoint.save(state, folder / "checkpoint")  # with the best score so far
            if not hopeful:
                score, step = state.best or (math.nan, 0)
                progress.say(f"stopping after step {done.step}: {task.goal} was best at step {step}, {score:.4g}")
                break
    watch.process_peak = process_peak() if config.profiler.process else None
    return loss


def _evaluate_last(state: State, task: Task, log: RunLog, *, progress: Progress) -> dict[str, float]:
    """The scores after the last step."""
    progress.say("evaluating on what was held out")
    started = time.perf_counter()
    with averaged(state):
        scores = task.evaluate(state.model)
    log.write({"step": state.step, **scores, "seconds": time.perf_counter() - started})
    return scores


def _kept_on_fault(steps: Iterator[StepResult], state: State, folder: Path) -> Iterator[StepResult]:
    """The steps. On DataError, which comes between two steps, save a checkpoint of those that were taken, and re-raise.

    A private run has then drawn a batch that it did not use. The continued run draws the same batch.
    """
    began = state.step
    try:
        yield from steps
    except DataError:
        if state.step > began:
            checkpoint.save(state, folder / "checkpoint")
        raise


def _evaluate(config: Config, state: State, task: Task, log: RunLog) -> bool:
    """Score what is held out in the middle of a run; False when it has not become better for long enough."""
    with averaged(state):
        scores = task.evaluate(state.model)
    log.write({"step": state.step, **scores})
    name = task.goal.removeprefix("-")
    score = -scores[name] if task.goal.startswith("-") else scores[name]
    if state.best is None or score > state.best[0]:
        state.best = score, state.step
    evaluations = (state.step - state.best[1]) // config.trainer.evaluate_every
    return not config.trainer.patience or evaluations < config.trainer.patience


def _write_memory(
    config: Config, folder: Path, worst: MemoryReport | None, measured: dict[str, Measurement]
) -> dict[str, Any]:
    """`memory.json`, `memory.png` and `memory.html`; returns the part that stands in `result.json`."""
    mode = config.memory.mode
    reports = {name: each.report for name, each in measured.items()}
    shown = worst or reports.get(mode)
    if shown is None:
        return {}
    content = {"mode": mode, "step": shown.as_dict(), "compared": {k: r.as_dict() for k, r in reports.items()}}
    (folder / "memory.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")
    private = ", private" if config.privacy.option != "none" else ""
    drawn = {name if name == PLAIN else name + private: report for name, report in (reports or {mode: shown}).items()}
    title = "Live memory of one training step"
    plot_reports(drawn, folder / "memory.png", title=title)
    write_html(drawn, folder / "memory.html", title=title)
    own = measured.get(mode)
    return {
        "mode": mode,
        "peak_bytes": shown.peak_bytes,
        "peak_by_category": shown.peak_by_category,
        "start_bytes": shown.start_bytes,
        "allocator_peak_bytes": own.report.allocator_peak_bytes if own else shown.allocator_peak_bytes,
        "compared": {
            name: {
                "peak_bytes": each.report.peak_bytes,
                "peak_by_category": each.report.peak_by_category,
                "start_bytes": each.report.start_bytes,
                "allocator_peak_bytes": each.report.allocator_peak_bytes,
                "seconds": each.seconds,
                "loss": each.loss,
            }
            for name, each in measured.items()
        },
    }


def _last_lines(
    config: Config, task: Task, scores: dict[str, float], measured: dict[str, Measurement], memory: dict[str, Any]
) -> Iterator[str]:
    """What was reached, and what was saved."""
    yield task.summary(scores)
    own = measured.get(config.memory.mode)
    if own is None:
        if memory:
            peak = format_bytes(memory["peak_bytes"])
            yield f"Peak of live memory of a training step, measured: {memory['mode']} {peak}"
        return
    held = own.report.peak_bytes
    yield f"Peak of live memory, forward and backward, measured: {config.memory.mode} {format_bytes(held)}"
    for name, other in measured.items():
        if name != config.memory.mode:
            ratio, slower = other.report.peak_bytes / held, own.seconds / other.seconds
            yield (
                f"  {name} would take {format_bytes(other.report.peak_bytes)}, {ratio:.2f} times as much; "
                f"{config.memory.mode} took {slower:.2f} times its time per step"
            )
