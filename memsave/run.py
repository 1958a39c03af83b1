"""The command line: compose a config, run it, write its result.

    python -m memsave.run experiment=brats_rev
    python -m memsave.run experiment=gpt2_dp
    python -m memsave.run experiment=brats_rev data=brats data.root=/my/BraTS2021 trainer.steps=20000
    python -m memsave.run -m experiment=brats_rev memory=stored,checkpoint,reversible
    python -m memsave.run experiment=brats_rev mode=plan budget=16GiB vary=volume
    python -m memsave.run trainer.resume=outputs/brats_rev/2026-01-31_10-00-00
    torchrun --nproc_per_node=2 -m memsave.run experiment=brats_rev

Exit codes: 0 ok, 1 failed, 2 bad input or configuration, 3 out of memory or over budget, 130 interrupted. A sweep
continues after a failed job and then exits with 1. Repeated with the same hydra.sweep.dir, it skips finished jobs.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

# torch reads it when it is imported; otherwise its C++ part warns that the profiler missed earlier allocations
os.environ["TORCH_CPP_LOG_LEVEL"] = os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")
# torch reads it at its first large tensor on the CPU: Linux maps such memory faster in pages of 2 MiB than of 4 KiB
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from memsave.config import ConfigError
from memsave.config.compose import compose, load_schemas, to_objects
from memsave.config.overrides import literal, override, parse
from memsave.config.registry import conf_dir
from memsave.failures import Failures
from memsave.following import follow
from memsave.leading import Run, end_followers, give_order, start_processes
from memsave.outcome import disk_message, failed, interrupted, print_error
from memsave.processes import group_size, process_rank
from memsave.resume import ResumedRun, resumed_run
from memsave.training.signals import interrupt_at_signals

OUTPUT_FILES = (
    "plan.md", "plan.png", "overlay.png", "scores.csv", "confusion.png", "samples.md",
    "memory.png", "memory.html", "privacy.md", "audit.md", "audit.png",
    "model", "tensorboard", "result.json", "error.txt",
)  # fmt: skip
"""Files and folders of a run that its last line lists, in this order."""
REPORTED = "reported"
"""The argument of a KeyboardInterrupt that the run has already reported."""
_exit_code = 0


def main() -> None:
    """Run the command line, and exit with its exit code."""
    sys.argv[1:] = [literal(argument) for argument in sys.argv[1:]]
    try:
        start_processes(sys.argv[1:])
    except ConfigError as error:
        sys.exit(print_error(error, code=2))
    if process_rank() > 0:
        sys.exit(follow())
    code = 1
    try:
        code = _lead()
    finally:
        end_followers(code)
    sys.exit(code)


def _lead() -> int:
    """Run the command line in the only process, or in rank 0; returns the exit code."""
    try:
        resumed = resumed_run(sys.argv[1:])
        if resumed is not None:
            interrupt_at_signals()  # replaces the handler of startup.py
            return continue_run(resumed)
        check_overrides(sys.argv[1:])
    except ConfigError as error:
        return print_error(error, code=2)
    if {"--help", "-h"} & set(sys.argv):
        print(
            f"{__doc__}\nKeys: {conf_dir()}, memsave/config/schema.py; --cfg job prints the config that the overrides "
            "select."
        )
        return 0
    interrupt_at_signals()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and the handlers below print one sentence
    try:
        load_schemas()
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)()
    except KeyboardInterrupt as stop:
        if REPORTED not in stop.args:
            print("interrupted", file=sys.stderr)
        return 130
    except ConfigError as error:
        return print_error(error, code=2)
    except OSError as error:
        return print_error(f"the output folder cannot be created ({error}); give another by hydra.run.dir=", code=2)
    except (HydraException, OmegaConfBaseException) as error:
        return print_error(str(error).splitlines()[0], code=2)
    return _exit_code


def continue_run(resumed: ResumedRun) -> int:
    """Run the remaining steps of a run; returns the exit code."""
    from memsave.progress import Progress
    from memsave.training.result import read_request
    from memsave.training.run_folder import refuse_second_run

    refuse_second_run(resumed.folder, resume=resumed.config.trainer.resume)
    if resumed.changes:
        Progress().say(f"continuing with changed settings: {', '.join(resumed.changes)}")
    if resumed.changes and to_objects(resumed.config).privacy.option != "none":
        Progress().say(
            "never keep two runs with different settings that continue one private checkpoint: they have the same noise"
        )
    request = None if resumed.changes else read_request(resumed.folder)
    return execute(resumed.config, resumed.folder, experiment=resumed.experiment, request=request, continued=True)


@contextmanager
def _restore_on_failure(folder: Path) -> Iterator[None]:
    """Restore the files of a run if it fails within the context and saves no newer checkpoint."""
    from memsave.files import replacing
    from memsave.training.result import read_result

    names = ("metrics.jsonl", "config.yaml", "result.json", "privacy.md")
    saved = folder / "checkpoint" / "state.json"
    state = saved.read_bytes() if saved.is_file() else None
    before = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    yield
    if read_result(folder).get("status") != "ok" and saved.is_file() and saved.read_bytes() == state:
        for name, content in before.items():
            with replacing(folder / name) as draft:
                draft.write_bytes(content)


def job(config: DictConfig) -> None:
    """Run one job in its own folder. In a repeated sweep, skip a finished job and continue an interrupted one."""
    global _exit_code
    from memsave.training.result import request_digest
    from memsave.training.run_folder import refuse_second_run

    hydra_config = HydraConfig.get()
    folder, experiment = Path(hydra_config.runtime.output_dir), hydra_config.runtime.choices["experiment"]
    if hydra_config.mode == RunMode.RUN:
        try:
            refuse_second_run(folder, resume=config.trainer.resume)
        except ConfigError as error:  # Hydra would add a line to the message
            _exit_code = print_error(error, code=2)
            return
        code = _exit_code = execute(config, folder, experiment=experiment)
    else:
        request = request_digest(config)
        strategies = _swept_strategy(config, hydra_config.overrides.task)
        done = is_done(folder, config, request=request)
        code = 0 if done else execute(config, folder, experiment=experiment, strategies=strategies, request=request)
    if code == 130:
        raise KeyboardInterrupt(REPORTED)


def is_done(folder: Path, config: DictConfig, *, request: str) -> bool:
    """Whether a job of a sweep has finished; sets `trainer.resume` if it was interrupted after a checkpoint.

    Raises ConfigError if the folder holds another job.
    """
    from memsave.files import newest_folder
    from memsave.training.result import read_request, read_result

    before = read_request(folder)
    if before not in (None, request) and _has_config(folder, config):
        before = request  # the digest is another one after an update that adds or moves keys
    if before not in (None, request):
        raise ConfigError(
            f"{folder} holds another job; repeat the command that created it, or give another hydra.sweep.dir"
        )
    if before == request and read_result(folder).get("status") == "ok":
        return True
    if before == request and newest_folder(folder / "checkpoint").is_dir() and config.trainer.resume is None:
        config.trainer.resume = str(folder / "checkpoint")
    return False


def _has_config(folder: Path, config: DictConfig) -> bool:
    """Whether `config.yaml` in the folder is this config, whatever checkpoint it was continued from."""
    from memsave.config.compose import load

    try:
        stored, asked = load(folder / "config.yaml"), to_objects(config)
    except ConfigError:
        return False
    return stored.changed({"trainer.resume": None}) == asked.changed({"trainer.resume": None})


def _swept_strategy(config: DictConfig, overrides: Sequence[str]) -> list[str] | None:
    """The strategy of a job if the sweep varies it; None to plan all strategies."""
    from memsave.tasks.definition import definition_of

    try:
        task = definition_of(to_objects(config))
    except ConfigError:  # the job ends with it, and the sweep goes on
        return None
    key = task.strategy_group
    chosen = any(override.partition("=")[0] in (key, f"{key}.mode") for override in overrides)
    return [task.current_strategy()] if chosen else None


class SweepEnd(Callback):
    """Collects the results at the end of a sweep, whose jobs may have run in other processes."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write one table and one picture; the exit code is 1 if a job has no result or a status other than ok."""
        global _exit_code
        from memsave.collect import collect

        folder = Path(config.hydra.sweep.dir)
        bad = [job for job in collect(folder) if job.status != "ok"]
        for job in bad:
            print_error(f"{job.status}: {job.folder}", code=1)
        if bad:
            again = override("hydra.sweep.dir", folder)
            print(f"repeat the command with {again} to run the missing jobs", file=sys.stderr)
        _exit_code = int(bool(bad))


def execute(
    config: DictConfig,
    folder: Path,
    *,
    experiment: str,
    strategies: list[str] | None = None,
    request: str | None = None,
    continued: bool = False,
) -> int:
    """Run the config, always write `result.json` to `folder`, and return the exit code.

    Args:
        config: the composed config.
        folder: the folder of the run.
        experiment: the name of the experiment.
        strategies: the strategies that `mode=plan` compares; None takes those of the task.
        request: the request digest for `config.yaml`; None takes the digest of this config.
        continued: the folder holds an earlier run, whose files are restored if this attempt fails before a checkpoint.
    """
    from memsave.training.run_folder import lock_folder

    processes = _to_start(config)
    if processes > 1:
        job = {"config": config, "folder": folder.resolve(), "experiment": experiment}
        job |= {"strategies": strategies, "request": request, "continued": continued}
        return _launch(job, processes=processes)
    failures = Failures()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(folder), _restore_on_failure(folder) if continued else nullcontext():
            return _execute(config, folder, failures, experiment=experiment, strategies=strategies, request=request)
    except ConfigError as error:
        return print_error(error, code=2)
    except OSError as error:
        return print_error(disk_message(folder, error), code=1)
    finally:
        failures.finish()


def _to_start(config: DictConfig) -> int:
    """The number of processes that this run must start; 1 if it is complete, or only plans."""
    wanted = config.trainer.processes
    return 1 if group_size() > 1 or wanted is None or config.mode == "plan" else int(wanted)


def _launch(job: dict[str, Any], *, processes: int) -> int:
    from memsave.launch import launch

    try:
        to_objects(job["config"])  # an error is reported once, before anything starts
        return launch(job, processes=processes)
    except ConfigError as error:
        return print_error(error, code=2)


def _execute(
    config: DictConfig,
    folder: Path,
    failures: Failures,
    *,
    experiment: str,
    strategies: list[str] | None,
    request: str | None,
) -> int:
    from memsave.files import write_json
    from memsave.progress import Progress
    from memsave.training.result import request_digest, versions, write_config

    started = time.perf_counter()
    (folder / "result.json").unlink(missing_ok=True)
    write_config(config, folder, request=request or request_digest(config), experiment=experiment)

    def end(status: str, code: int, outcome: dict[str, Any]) -> int:
        result = {
            "status": status,
            "experiment": experiment,
            "seconds": round(time.perf_counter() - started, 2),
            "seconds_per_step": None,
            "data": {},
            "metrics": {},
            "memory": {},
            "privacy": None,
            **outcome,
            "versions": versions(),
        }
        try:
            write_json(folder / "result.json", result)
        except OSError as error:
            reported = "cannot be written" in str(outcome.get("error"))  # the run ended for the same reason
            return code if reported else print_error(disk_message(folder, error), code=code or 1)
        shown = folder if not folder.is_relative_to(Path.cwd()) else folder.relative_to(Path.cwd())
        files = ", ".join(output_files(folder))
        Progress().say(f"{status} after {result['seconds']:.0f} s; results in {shown}: {files}")
        return code

    with failures.watched(lambda error: end(*failed(error, config, folder))):
        reached = _attempt(config, folder, failures, strategies=strategies)
    return end(*reached)


def output_files(folder: Path) -> list[str]:
    """The existing OUTPUT_FILES of a run; a folder ends in a slash."""
    return [f"{name}/" if (folder / name).is_dir() else name for name in OUTPUT_FILES if (folder / name).exists()]


def _attempt(
    config: DictConfig, folder: Path, failures: Failures, *, strategies: list[str] | None
) -> tuple[str, int, dict[str, Any]]:
    """(status, exit code, entries of the result) of the run."""
    try:
        from memsave.experiment import run_experiment
        from memsave.progress import Progress

        run = Run(to_objects(config), folder.resolve(), strategies)
        give_order(run)
        return "ok", 0, run_experiment(run.config, folder, strategies=strategies, progress=Progress())
    except KeyboardInterrupt as stop:
        return interrupted(folder, stop)
    except Exception as error:
        status, code, outcome = failed(failures.cause(error), config, folder)
        return status, code, {**outcome, **getattr(error, "outcome", {})}


def check_overrides(arguments: Sequence[str]) -> None:
    """Compose once for each value of a sweep before anything runs. Raises ConfigError for a fault."""
    sweep = any(argument in ("-m", "--multirun") for argument in arguments)
    overrides = [literal(argument) for argument in arguments if not argument.startswith("-")]
    if len(overrides) < len(arguments) - sweep:
        return  # Hydra checks the overrides that come with its own flags, such as --cfg
    options = []
    for before, text in zip([None, *overrides], overrides, strict=False):
        parsed = parse(text, after=before)
        if not (sweep and parsed.is_sweep_override()):
            options.append([text])
            continue
        try:
            values = list(parsed.sweep_string_iterator())
        except (HydraException, ValueError) as error:
            raise ConfigError(f"{text!r} cannot be read; list the values, as in -m KEY=ONE,OTHER") from error
        options.append([f"{parsed.get_key_element()}={value}" for value in values])
    first = [choices[0] for choices in options]
    compose(first)
    for number, choices in enumerate(options):
        for choice in choices[1:]:
            compose([*first[:number], choice, *first[number + 1 :]])


if __name__ == "__main__":
    # Hydra imports the callback from `memsave.run`: call `main` of that module, whose _exit_code the callback sets.
    from memsave import run

    run.main()
