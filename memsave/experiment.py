"""`run_experiment`: from a composed config to a folder of results."""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from memsave.config import Config, ConfigError
from memsave.config.schema import TrainerConfig
from memsave.data import DataError
from memsave.data.units import identity_of
from memsave.files import flush_all
from memsave.planning.auto import choose_memory
from memsave.planning.budget import OverBudget, free_bytes
from memsave.planning.compare import compare_modes
from memsave.planning.fit import fit_to_budget, plan_experiment
from memsave.planning.kept import choose_kept
from memsave.planning.pretend import planned_processes
from memsave.privacy.monitor import EpsilonMonitor
from memsave.process_group import own_device
from memsave.processes import (
    alone,
    any_process,
    gather,
    main_first,
    maximum,
    on_main,
    process_count,
    process_rank,
)
from memsave.profiler import MemoryReport, format_bytes, plot_reports, write_html
from memsave.progress import Progress
from memsave.tasks.definition import definition_of
from memsave.tf32 import tf32
from memsave.training import checkpoint
from memsave.training.audit import (
    AuditBreach,
    audit_result,
    describe_breach,
    finish_audit,
    make_audit,
    prepare_audit,
    write_audit,
)
from memsave.training.compiled import compile_blocks
from memsave.training.distributed import start_alike
from memsave.training.ledger import RunLedger, describe_others
from memsave.training.log import RunLog
from memsave.training.loop import State, StepResult, averaged, make_state, run_steps
from memsave.training.measure import PLAIN, Measurement
from memsave.training.monitor import MemoryMonitor
from memsave.training.private import make_mechanism, make_private, privacy_result
from memsave.training.process import process_bytes, process_peak, reset_process_peak, return_freed_memory
from memsave.training.sharding import full_tensors, is_sharded_model, shard_model, wants_sharding, whole
from memsave.training.signals import stop_requested
from memsave.training.statement import describe, round_up, write_statement
from memsave.training.task import Task, data_fingerprint


def run_experiment(
    config: Config, folder: Path, *, strategies: list[str] | None = None, progress: Progress
) -> dict[str, Any]:
    """Train, evaluate, measure memory, and write the files of the run to `folder`; returns entries of `result.json`.

    With `mode=plan`, plan the strategies of the task (or only `strategies`), and return the entry `plan`.
    """
    with tf32(allowed=config.trainer.tf32):
        return _planned_and_trained(config, folder, strategies=strategies, progress=progress)


def _planned_and_trained(
    config: Config, folder: Path, *, strategies: list[str] | None, progress: Progress
) -> dict[str, Any]:
    device = own_device(choose_device(config.trainer.device), key="trainer.device")
    if config.trainer.precision == "float16" and device.type != "cuda":
        raise ConfigError("trainer.precision=float16 is for CUDA; give trainer.precision=bfloat16 on the CPU")

    def least_free() -> int:
        return -maximum(-free_bytes(device, processes=planned_processes(config)))

    if config.budget == "auto":
        config = config.changed({"budget": str(least_free())})
    config = on_main(choose_memory, config, folder, device, progress=progress)
    needs_free = getattr(config.privacy, "memory_budget", None) == "auto"
    free = least_free() if needs_free else 0
    if config.mode == "plan":
        config = on_main(choose_kept, config, folder, device, free=free, progress=progress)
        return on_main(plan_experiment, config, folder, device, strategies=strategies, progress=progress)
    config, planned = on_main(fit_to_budget, config, folder, device, progress=progress)
    config = on_main(choose_kept, config, folder, device, free=free, progress=progress)
    config, state, task = _prepared(config, folder, device, progress=progress)
    ledger = RunLedger(state, folder, steps=config.trainer.steps, say=progress.say)
    if line := describe_others(ledger.other_runs(steps=config.trainer.steps)):
        progress.say(line)
    try:
        return planned | _trained(config, state, task, folder, ledger=ledger, progress=progress)
    except BaseException as error:
        spent = privacy_result(config, state, unit=task.unit, other_runs=ledger.other_runs)
        with suppress(OSError):  # the error may be a full disk
            if process_rank() == 0:
                write_statement(spent, folder)
        known = {"data": _data(state, task), "privacy": spent}
        error.outcome = {**planned, **known, **getattr(error, "outcome", {})}  # type: ignore[attr-defined]
        raise
    finally:
        ledger.update(ended=True)


def _data(state: State, task: Task) -> dict[str, Any]:
    """The entry `data` of `result.json`."""
    return {**task.counts, "fingerprint": state.data}


def _trained(
    config: Config, state: State, task: Task, folder: Path, *, ledger: RunLedger, progress: Progress
) -> dict[str, Any]:
    """Train and write the model, then evaluate and draw: an error there loses no step."""
    log = RunLog(folder, tensorboard=config.trainer.tensorboard, step=state.step)
    first = _evaluate_first(config, state, task, log, progress=progress)
    measured = compare_modes(config, state, task, progress=progress)
    monitor = MemoryMonitor(state, steps=config.profiler.record_steps, budget=config.budget)
    try:
        ledger.start()
        loss = _train(config, state, task, folder, log=log, monitor=monitor, ledger=ledger, progress=progress)
    except OverBudget as stop:
        stop.outcome = {"memory": on_main(_write_memory, config, folder, monitor.last, measured)}
        raise
    _release(config, state, task, folder)
    spent = privacy_result(config, state, unit=task.unit, other_runs=ledger.other_runs)
    on_main(write_statement, spent, folder)
    report = finish_audit(config, state, task)
    on_main(write_audit, report, folder)
    scores = _evaluate_last(state, task, log, progress=progress)
    memory = on_main(_write_memory, config, folder, monitor.worst, measured)
    if process_count() > 1:
        memory["peak_bytes_by_process"] = gather(monitor.worst and monitor.worst.peak_bytes)
    if monitor.process_peak is not None:
        memory |= {"process_peak_bytes": monitor.process_peak, "process_start_bytes": monitor.process_start}
        start = format_bytes(monitor.process_start or 0)
        progress.say(
            f"Peak memory of the process during training: {format_bytes(monitor.process_peak)}, {start} before"
        )
    on_main(task.show, folder)
    for line in _last_lines(config, task, scores, measured, memory):
        progress.say(line)
    if spent is not None:
        progress.say(describe(spent))
        if others := describe_others(spent["other_runs"]):
            progress.say(others)
    result = {
        "data": _data(state, task),
        "metrics": {"loss": loss, **scores, **first},
        **({"processes": process_count()} if process_count() > 1 else {}),
        "seconds_per_step": median(monitor.seconds) if monitor.seconds else None,
        **({"tokens_per_second": median(monitor.token_rates)} if monitor.token_rates else {}),
        "memory": memory,
        "privacy": spent,
        **audit_result(report),
    }
    if report is not None:
        progress.say(str(report))
        if report.breach:
            breach = AuditBreach(describe_breach(report))
            breach.outcome = result  # type: ignore[attr-defined]
            raise breach
    return result


def _release(config: Config, state: State, task: Task, folder: Path) -> None:
    """Write `model/`, with the averaged weights if there is an average."""
    with averaged(state):
        model = whole_copy(config, state.model)
        on_main(_write_model, config, task, model, folder / "model")


def _write_model(config: Config, task: Task, model: nn.Module, folder: Path) -> None:
    task.release(config.adapter.released(model), folder)
    flush_all(folder)  # before result.json says that the run has ended


def whole_copy(config: Config, model: nn.Module) -> nn.Module:
    """The model itself, or, of a sharded one, a whole model with its weights in rank 0, on the CPU."""
    if not is_sharded_model(model):
        return model
    main = process_rank() == 0
    tensors = full_tensors(dict(model.named_parameters()) | dict(model.named_buffers()), keep=main)
    if not main:
        return model
    with alone(), torch.random.fork_rng(devices=[]):
        copy, _ = make_model(config, progress=Progress(silent=True))
    named = dict(copy.named_parameters()) | dict(copy.named_buffers())
    with torch.no_grad():
        for name, tensor in tensors.items():
            named[name].copy_(tensor)
    return copy.train(model.training)


def _prepared(config: Config, folder: Path, device: torch.device, *, progress: Progress) -> tuple[Config, State, Task]:
    """(the config with its number of steps, the state before the first step to take, the task); `folder`: of the run.

    The state is new, or that of the checkpoint in `trainer.resume`.
    """
    torch.manual_seed(config.trainer.seed)
    progress.say(
        f"data={config.data.kind}, memory={config.memory.described}, privacy={config.privacy.option}, on {device}"
    )
    with main_first():  # data and small models are generated once, and cached
        model, tokenizer = make_model(config, progress=progress)
        task, model = make_task(config, device, tokenizer, progress=progress), model.to(device)
    start_alike(model, task, seed=config.trainer.seed)
    progress.say(task.describe_counts())
    config = config.changed({"trainer.steps": config.trainer.steps_for(task.size), "trainer.epochs": None})
    trainer = config.trainer
    frozen, data, examples = checkpoint.digest_of_frozen(model), data_fingerprint(task), task.fingerprint
    audit = make_audit(config, task, progress=progress)
    mechanism = make_mechanism(config, model, task, audit=audit, progress=progress)
    if wants_sharding(trainer):
        shard_model(model, device)
    if trainer.compile:
        count = compile_blocks(definition_of(config).compiled_blocks(model))
        progress.say(f"{count} blocks are compiled in the first steps")
    private = make_private(config, model, mechanism, audit=audit)
    if private is not None and not private.seeded:
        torch.seed()  # a known seed would tie the dropout of all examples to which of them are in the batch
    state = make_state(model, trainer, private=private, memory=config.memory, folder=folder)
    state.data, state.frozen = data, frozen
    state.identity = {
        "trainer.batch_size": trainer.batch_size,
        "trainer.seed": trainer.seed,
        **identity_of(config.data),
        "set of training data": examples,
    }
    if trainer.resume:
        checkpoint.load(state, Path(trainer.resume).expanduser())
        if state.step > trainer.steps:
            raise ConfigError(f"trainer.steps is {trainer.steps}, but the checkpoint is at step {state.step}")
        progress.say(f"continuing after step {state.step} of {trainer.steps}")
    prepare_audit(state, task, trainer)
    return config, state, task


def choose_device(name: str, *, key: str = "trainer.device") -> torch.device:
    """The device of the config key `key`, whose value is `name`. Raises ConfigError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{key} is {name!r}; give auto, cpu, cuda or cuda:NUMBER") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{key} is {name!r}; give auto, cpu, cuda or cuda:NUMBER")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{key} is {name!r}, but PyTorch finds no GPU; give {key}=cpu")
    return device


def make_model(config: Config, *, progress: Progress | None = None) -> tuple[nn.Module, Any]:
    """(the model in its memory mode, on the CPU; its tokenizer or None)."""
    model, tokenizer = definition_of(config).make_model(progress=progress or Progress())
    return config.adapter.apply(model), tokenizer


def make_task(config: Config, device: torch.device, tokenizer: Any = None, *, progress: Progress | None = None) -> Task:
    """The task with its data."""
    return definition_of(config).training_task(device, tokenizer, progress=progress or Progress())


def _evaluate_first(config: Config, state: State, task: Task, log: RunLog, *, progress: Progress) -> dict[str, float]:
    """The scores before the first step; their names end in _before."""
    if not config.trainer.evaluate_first:
        return {}
    if state.step:
        return log.scores_before
    progress.say("evaluating before training")
    with whole(state.model):
        before = {f"{name}_before": score for name, score in task.evaluate(state.model).items()}
    log.write({"step": state.step, **before})
    return before


def _train(
    config: Config,
    state: State,
    task: Task,
    folder: Path,
    *,
    log: RunLog,
    monitor: MemoryMonitor,
    ledger: RunLedger,
    progress: Progress,
) -> float | None:
    """Take the steps, log them, save checkpoints; returns the last loss, or None if no step was left."""
    trainer = config.trainer
    loss: float | None = None
    epsilon_monitor = None if state.private is None else EpsilonMonitor(state.private, steps=trainer.steps)
    if config.profiler.process:
        if not return_freed_memory():  # also what planning has freed
            progress.say("malloc is not glibc's and may keep freed memory: the memory of the process will look larger")
        reset_process_peak()
        monitor.process_start = process_bytes()
    if _evaluates_after(trainer, state.step):  # the run that is continued may have ended before this evaluation
        scores = on_main(lambda: log.scores)
        if not _evaluate(config, state, task, folder, log=log, progress=progress, scores=scores):
            return None
    with progress.bar(trainer.steps, done=state.step) as bar, stop_requested() as stopping:
        for done in _save_on_data_error(
            run_steps(state, task, trainer, workers=config.data.workers, monitor=monitor), state, folder, log
        ):
            loss, spent = done.loss, {} if epsilon_monitor is None else epsilon_monitor.metrics()
            log.write({**_logged(done), **spent})
            monitor.add(done)
            bar.advance(_note(done, spent))
            stop, excess = _reasons_to_stop(stopping(), monitor.excess(done.step))
            last = done.step == trainer.steps
            evaluate = _evaluates_after(trainer, done.step)
            if done.step % trainer.checkpoint_every == 0 or last or stop or excess or evaluate:
                log.flush()
                checkpoint.save(state, folder / "checkpoint")  # before an evaluation: an error there loses no steps
                ledger.update()
            if stop:
                _release(config, state, task, folder)
                raise KeyboardInterrupt
            if excess:
                raise OverBudget(excess)
            if evaluate and not _evaluate(config, state, task, folder, log=log, progress=progress):
                break
    monitor.process_peak = process_peak() if config.profiler.process else None
    return loss


def _reasons_to_stop(stop: bool, excess: str | None) -> tuple[bool, str | None]:
    """(whether any process got a signal, a sentence of one whose step exceeded the budget); the same on all processes.

    A signal may arrive in one process earlier than in another.
    """
    stop, exceeded = any_process(stop), any_process(excess is not None)
    return stop, next(each for each in gather(excess) if each is not None) if exceeded else None


def _logged(done: StepResult) -> dict[str, Any]:
    """The line of a step in the log, without `tokens` for a task that has none."""
    return {key: value for key, value in asdict(done).items() if key != "tokens" or value is not None}


def _note(done: StepResult, spent: dict[str, float]) -> str:
    """Loss, epsilon and tokens per second of a step, for the progress."""
    parts = ["an empty batch" if done.loss is None else f"loss {done.loss:.3f}"]
    parts += [f"epsilon {round_up(value, '.2f')}" for value in spent.values()]
    parts += [] if done.tokens is None else [f"{done.tokens / done.seconds:.0f} tokens/s"]
    return ", ".join(parts)


def _evaluate_last(state: State, task: Task, log: RunLog, *, progress: Progress) -> dict[str, float]:
    """The scores after the last step."""
    progress.say("evaluating on the held-out data")
    started = time.perf_counter()
    with averaged(state), whole(state.model):
        scores = task.evaluate(state.model)
    log.write({"step": state.step, **scores, "seconds": time.perf_counter() - started})
    return scores


def _save_on_data_error(steps: Iterator[StepResult], state: State, folder: Path, log: RunLog) -> Iterator[StepResult]:
    """The steps. On DataError, which occurs between two steps, save a checkpoint of the completed steps, then re-raise.

    A private run has then drawn a batch without using it. When continued, it draws the same batch.
    """
    start = state.step
    try:
        yield from steps
    except DataError:
        if state.step > start:
            log.flush()
            checkpoint.save(state, folder / "checkpoint")
        raise


def _evaluates_after(trainer: TrainerConfig, step: int) -> bool:
    """Whether the held-out data are scored after this step, during training."""
    return bool(trainer.evaluate_every) and step % trainer.evaluate_every == 0 and 0 < step < trainer.steps


def _evaluate(
    config: Config,
    state: State,
    task: Task,
    folder: Path,
    *,
    log: RunLog,
    progress: Progress,
    scores: dict[str, float] | None = None,
) -> bool:
    """Score the held-out data during training; False after `trainer.patience` evaluations without a better score.

    `scores`: those of this step in the log of the run that is continued, if there are any.
    """
    name = task.goal.removeprefix("-")
    if scores is None or name not in scores:
        with averaged(state), whole(state.model):
            scores = task.evaluate(state.model)
        log.write({"step": state.step, **scores})
    score = -scores[name] if task.goal.startswith("-") else scores[name]
    if state.best is None or score > state.best[0]:
        state.best = score, state.step
    patience = config.trainer.patience
    if not patience:
        return True
    checkpoint.save(state, folder / "checkpoint")  # now with the best score
    best, step = state.best
    if (state.step - step) // config.trainer.evaluate_every < patience:
        return True
    progress.say(f"stopping after step {state.step}: {task.goal} was best at step {step}, {best:.4g}")
    return False


def _write_memory(
    config: Config, folder: Path, worst: MemoryReport | None, measured: dict[str, Measurement]
) -> dict[str, Any]:
    """Write `memory.json`, `memory.png` and `memory.html`; returns the entry `memory` of `result.json`."""
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
        "offloaded": config.memory.offload,
        "offloaded_bytes": shown.offloaded_bytes,
        "compared": {
            name: {
                "peak_bytes": each.report.peak_bytes,
                "peak_by_category": each.report.peak_by_category,
                "start_bytes": each.report.start_bytes,
                "allocator_peak_bytes": each.report.allocator_peak_bytes,
                "offloaded_bytes": each.report.offloaded_bytes,
                "seconds": each.seconds,
                "loss": each.loss,
            }
            for name, each in measured.items()
        },
    }


def _last_lines(
    config: Config, task: Task, scores: dict[str, float], measured: dict[str, Measurement], memory: dict[str, Any]
) -> Iterator[str]:
    """Lines about the scores and the memory."""
    yield task.summary(scores)
    if memory.get("offloaded_bytes"):
        yield f"Most bytes in host memory in a training step, measured: {format_bytes(memory['offloaded_bytes'])}"
    own = measured.get(config.memory.mode)
    if own is None:
        if memory:
            peak = format_bytes(memory["peak_bytes"])
            yield f"Peak of live memory of a training step, measured: {memory['mode']} {peak}"
        return
    peak_bytes = own.report.peak_bytes
    yield f"Peak of live memory, forward and backward, measured: {config.memory.mode} {format_bytes(peak_bytes)}"
    for name, other in measured.items():
        if name != config.memory.mode:
            ratio, slower = other.report.peak_bytes / peak_bytes, own.seconds / other.seconds
            yield (
                f"  {name}: {format_bytes(other.report.peak_bytes)}, {ratio:.2f} times as much; "
                f"a step of {config.memory.mode} takes {slower:.2f} times as long"
            )
