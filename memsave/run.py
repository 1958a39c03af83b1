"""The command line: compose a config, run it, write its result.

    python -m memsave.run experiment=brats_rev
    python -m memsave.run experiment=brats_rev data=brats data.root=/my/BraTS2021 trainer.steps=20000
    python -m memsave.run -m experiment=brats_rev memory=stored,checkpoint,reversible

Exit codes: 0 ok, 1 failed, 2 bad input or configuration, 3 out of memory, 130 interrupted. A sweep goes on past a job
that fails, and exits with 1 when any did.
"""

import itertools
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from memsave.config import ConfigError, compose, conf_dir, register, to_objects

_exit_codes: list[int] = []


def main() -> None:
    """Run what the command line asks for, and exit."""
    try:
        _check_overrides(sys.argv[1:])
    except ConfigError as error:
        sys.exit(_complain(error, code=2))
    signal.signal(signal.SIGTERM, _interrupt)
    register()
    folder = str(conf_dir())
    try:
        hydra.main(version_base="1.3", config_path=folder, config_name="config")(job)()
    except KeyboardInterrupt:
        sys.exit(130)
    if "--multirun" in sys.argv or "-m" in sys.argv:
        sys.exit(int(any(_exit_codes)))
    sys.exit(max(_exit_codes, default=0))


def job(config: DictConfig) -> None:
    """One run in its own folder, whatever happens in it."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    code = execute(config, folder, experiment=HydraConfig.get().runtime.choices["experiment"])
    _exit_codes.append(code)
    if code == 130:
        raise KeyboardInterrupt


def execute(config: DictConfig, folder: Path, *, experiment: str) -> int:
    """Run the config into `folder`, leave `result.json` there in any case, and return the exit code."""
    from memsave.training.progress import Progress
    from memsave.training.result import versions, write_json

    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    progress = Progress()
    started = time.perf_counter()
    status, code, outcome = _attempt(config, folder, progress)
    result = {
        "status": status,
        "experiment": experiment,
        "seconds": round(time.perf_counter() - started, 2),
        "metrics": {},
        "memory": {},
        "privacy": None,
        **outcome,
        "versions": versions(),
    }
    write_json(folder / "result.json", result)
    shown = folder if not folder.is_relative_to(Path.cwd()) else folder.relative_to(Path.cwd())
    files = sorted(path.name for path in folder.iterdir() if path.suffix in (".png", ".json"))
    progress.say(f"{status} after {result['seconds']:.0f} s; look at {shown}: {', '.join(files)}")
    return code


def _attempt(config: DictConfig, folder: Path, progress: Any) -> tuple[str, int, dict[str, Any]]:
    """(status, exit code, what stands in the result) of the run."""
    from memsave.data import DataError
    from memsave.training.checkpoint import CheckpointError
    from memsave.training.experiment import run_experiment
    from memsave.training.loop import TrainingError

    try:
        return "ok", 0, run_experiment(to_objects(config), folder, progress=progress)
    except (ConfigError, DataError, CheckpointError) as error:
        return "failed", _complain(error, code=2), {"error": str(error)}
    except TrainingError as error:
        return "failed", _complain(error, code=1), {"error": str(error)}
    except KeyboardInterrupt:
        resume = folder / "checkpoint"
        progress.say(f"interrupted; continue with trainer.resume={resume}" if resume.exists() else "interrupted")
        return "interrupted", 130, {}
    except ModuleNotFoundError as error:
        message = f"the package {error.name} is not installed; install it with: pip install 'memsave[brats]'"
        return "failed", _complain(message, code=2), {"error": message}
    except Exception as error:
        if _out_of_memory(error):
            message = "the step does not fit into memory; try memory=reversible, or smaller data.crop_size or channels"
            return "oom", _complain(message, code=3), {"error": message}
        (folder / "error.txt").write_text(traceback.format_exc())
        message = f"{type(error).__name__}: {error} (the whole story is in {folder / 'error.txt'})"
        return "failed", _complain(message, code=1), {"error": message}


def _check_overrides(arguments: Sequence[str]) -> None:
    """Compose once for each choice of a sweep before anything runs; ConfigError says what is wrong."""
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    if len(overrides) < len(arguments) - sum(a in ("-m", "--multirun") for a in arguments):
        return  # Hydra's own flags (--help, --cfg, --config-dir ...): it checks what it is given
    parser = OverridesParser.create()
    try:
        parsed = [parser.parse_override(each) for each in overrides]
    except HydraException as error:
        raise ConfigError(f"{getattr(error, 'override', overrides)!r} cannot be read; write key=value") from error
    choices = [list(p.sweep_string_iterator()) if p.is_sweep_override() else [p.value()] for p in parsed]
    swept = [
        [f"{p.get_key_element()}={value}" for value in values] if p.is_sweep_override() else [text]
        for p, values, text in zip(parsed, choices, overrides, strict=True)
    ]
    first = [options[0] for options in swept]
    for number, options in enumerate(swept):
        for option in itertools.islice(options, 1, None):
            compose([*first[:number], option, *first[number + 1 :]])
    compose(first)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _out_of_memory(error: BaseException) -> bool:
    import torch

    # The CPU's allocator raises a RuntimeError that only its words tell apart.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _complain(error: object, *, code: int) -> int:
    print(f"memsave: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
