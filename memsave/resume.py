"""Continuing a run, given only its folder.

    python -m memsave.run trainer.resume=outputs/brats_rev/2026-01-31_10-00-00

The config is read from the run's `config.yaml`. Other overrides change it, as in trainer.steps=300; a message lists the
changes. The run continues in its own folder, or in the folder of hydra.run.dir.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from memsave.config import ConfigError
from memsave.config.compose import compose_option, load, to_objects
from memsave.config.known_keys import unknown_key
from memsave.config.overrides import parse
from memsave.config.registry import GROUPS
from memsave.training.result import flatten

KEY = "trainer.resume"


@dataclass(frozen=True)
class ResumedRun:
    """A run to continue."""

    config: DictConfig
    folder: Path
    """The folder in which it continues."""
    experiment: str
    changes: list[str]
    """Differences from the config of the run, as in "trainer.steps=300 (was 150)"."""


def resumed_run(arguments: Sequence[str]) -> ResumedRun | None:
    """The run that the command line continues; None without a trainer.resume whose run has a `config.yaml`.

    Raises ConfigError for overrides that are not valid for the run.
    """
    if any(argument.startswith("-") for argument in arguments):
        return None  # a sweep, or a flag of Hydra
    given = [parse(text, after=before) for before, text in zip([None, *arguments], arguments, strict=False)]
    named = [str(each.value()) for each in given if each.key_or_group == KEY and each.value() is not None]
    run = _run_of(Path(named[-1]).expanduser()) if named else None
    return None if run is None else _continued(run, given, named=named[-1])


def _run_of(path: Path) -> Path | None:
    """The run's folder for a path to it or to its checkpoint; None if it has no `config.yaml`."""
    return next((folder for folder in (path, path.parent) if (folder / "config.yaml").is_file()), None)


def _continued(run: Path, given: Sequence[Override], *, named: str) -> ResumedRun:
    from memsave.training.result import read_experiment, read_result

    own = OmegaConf.structured(load(run / "config.yaml"))
    experiment = read_experiment(run) or read_result(run).get("experiment")
    config, folder = own.copy(), run
    for each in given:
        key, value = each.key_or_group, each.value()
        if each.is_sweep_override():
            raise ConfigError(f"{each.input_line} gives several values, but one run is continued; give one value")
        if key == "hydra.run.dir":
            folder = Path(str(value)).expanduser()
        elif key == "experiment":
            if experiment not in (None, value):
                raise ConfigError(f"{run} is a run of experiment={experiment}; leave experiment={value} out")
            experiment = str(value)
        elif key in GROUPS:
            config[key] = _chosen(key, str(value), own=config[key])
        elif key != KEY:
            _update(config, each)
    config.trainer.resume = named
    to_objects(config)
    return ResumedRun(config, folder, experiment or run.parent.name, list(_changes(own, config)))


def _chosen(group: str, option: str, *, own: DictConfig) -> DictConfig:
    """The settings of an option; the run's own settings if they are of that option."""
    try:
        found = compose_option(group, option)
    except ConfigError as error:
        raise ConfigError(f"{group}={option} is not known; leave it out to keep the option of the run") from error
    names = [key for key in ("kind", "mode", "passes") if key in found]
    same = all(OmegaConf.select(own, key) == found[key] for key in names)
    return own if same else found


def _update(config: DictConfig, override: Override) -> None:
    key = override.key_or_group
    if override.is_add() or override.is_delete():
        raise ConfigError(f"{override.input_line} adds or deletes a key; change existing keys by key=value")
    try:
        if OmegaConf.select(config, key.rpartition(".")[0]) is None and "." in key:
            raise ConfigKeyError(key)
        OmegaConf.update(config, key, override.value())
    except (ConfigAttributeError, ConfigKeyError) as error:
        group = config.get(key.partition(".")[0])
        names = list(map(str, group)) if isinstance(group, DictConfig) else GROUPS
        raise ConfigError(unknown_key(key, names, choices={})) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from error


def _changes(own: DictConfig, config: DictConfig) -> Iterator[str]:
    before, after = (dict(flatten(OmegaConf.to_container(each))) for each in (own, config))
    for key in dict.fromkeys([*before, *after]):
        if key != KEY and before.get(key) != after.get(key):
            yield f"{key}={after.get(key)} (was {before.get(key)})"
