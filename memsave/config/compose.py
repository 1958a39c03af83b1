"""Composition of a config by Hydra, with one-sentence errors.

The command line calls `compose` before anything runs. A fault in the overrides raises a `ConfigError` that names the
key, the expected value, and the closest valid name.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import MISSING as MISSING_DEFAULT
from dataclasses import fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import YAMLError

from memsave.config.checks import check
from memsave.config.errors import ConfigError
from memsave.config.fields import closest
from memsave.config.known_keys import listed, options_with, unknown_key
from memsave.config.older import converted
from memsave.config.overrides import literal, parse, several
from memsave.config.registry import GROUPS, component, conf_dir, experiments, load_components, names, options
from memsave.config.schema import Config
from memsave.config.yaml_files import read_yaml

VERSION, VERSION_KEY = 4, "schema_version"
"""The version of `config.yaml`. Increase it when the meaning of a key changes, and let `load` convert older files."""


def compose(overrides: Sequence[str]) -> DictConfig:
    """Compose the config of the overrides. Raises ConfigError if they are not valid."""
    load_schemas()
    overrides = [literal(text) for text in overrides]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            for before, text in zip([None, *overrides], overrides, strict=False):
                if parse(text, after=before).is_sweep_override():
                    raise ConfigError(several(text))
            config = hydra_compose("config", overrides=list(overrides))
            _refuse_added_keys(config, choices=partial(_choices, overrides))
            to_objects(config)
            return config
        except MissingConfigException as error:
            raise ConfigError(_missing_option(error)) from error
        except ConfigCompositionException as error:
            raise ConfigError(_bad_override(error, choices=partial(_choices, overrides))) from error
        except ConfigError:
            raise
        except (HydraException, OmegaConfBaseException, ValueError, AssertionError) as error:
            raise ConfigError(_first_line(error)) from error


def compose_option(group: str, name: str) -> DictConfig:
    """The settings of one option of a group, unchecked. Raises ConfigError if there is no such option."""
    load_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Hydra expects `_self_` in the defaults of a config that is composed alone
        try:
            found: DictConfig = hydra_compose(f"{group}/{name}")[group]
        except MissingConfigException:
            known = sorted(options(group))
            raise ConfigError(
                f"{group}={name} is not known; choose one of {', '.join(known)}{closest(name, known)}"
            ) from None
        except HydraException as error:
            raise ConfigError(f"{group}={name} cannot be read ({_first_line(error)}); give another one") from error
    return found


@cache
def load_schemas() -> None:
    """Store the root schema and every registered component in Hydra's ConfigStore."""
    ConfigStore.instance().store(name="schema", node=Config)
    load_components()


def to_objects(config: DictConfig) -> Config:
    """The composed config as frozen dataclasses. Raises ConfigError for missing or invalid values."""
    try:
        plain = OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no value; give one, as in {error.full_key}=...") from error
    assert isinstance(plain, Config)
    check(plain)
    return plain.freeze()


def load(path: Path) -> Config:
    """Read the `config.yaml` of a run. Raises ConfigError if the file is not the config of a run."""
    try:
        found = read_yaml(path)
        if not isinstance(found, DictConfig):
            raise ValueError("it is a list")
        version = found.get(VERSION_KEY, 1)  # version 1 did not write the key
        if version not in range(1, VERSION + 1):
            raise ValueError(f"it has {VERSION_KEY} {version}, and this version of memsave reads up to {VERSION}")
        found = converted(found, version=version)
        config = OmegaConf.structured(Config)
        for group in GROUPS[1:]:
            own = found[group]
            kind = own.get("kind", group)
            if kind not in names(group):
                raise ValueError(f"{group}={kind} is not registered: install the package that adds it")
            config[group] = OmegaConf.merge(OmegaConf.structured(component(group, kind)), own)
        rest = {key: value for key, value in found.items() if key not in (*GROUPS, VERSION_KEY)}
        return to_objects(OmegaConf.merge(config, rest))  # type: ignore[arg-type]
    except (OSError, YAMLError, OmegaConfBaseException, KeyError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} is not the config of a run ({_first_line(error)}); give the folder of a run"
        ) from error


def _choices(overrides: Sequence[str]) -> dict[str, str]:
    """The option that the overrides select in each group, without their keys; empty if composition fails."""
    groups = [text for text in overrides if text.partition("=")[0].lstrip("+") in GROUPS]
    try:
        return dict(hydra_compose("config", overrides=groups, return_hydra_config=True).hydra.runtime.choices)
    except HydraException:
        return {}


def _refuse_added_keys(config: DictConfig, path: str = "", *, choices: Callable[[], dict[str, str]]) -> None:
    """Raise ConfigError for keys that +key=value added to a schema: nothing would read them."""
    names = _fields_of(OmegaConf.get_type(config))
    for key in map(str, config):
        if names and key not in names:
            raise ConfigError(unknown_key(f"{path}{key}", names, choices=choices()))
        if not OmegaConf.is_missing(config, key) and isinstance(config[key], DictConfig):
            _refuse_added_keys(config[key], f"{path}{key}.", choices=choices)


def _missing_option(error: MissingConfigException) -> str:
    """The message for an option that the group does not have."""
    group, _, option = str(error.missing_cfg_file or "").rpartition("/")
    options = [name for name in error.options or () if not name.endswith("_schema")]
    if not group:
        return _first_line(error)
    return f"{group}={option} is not known; choose one of {', '.join(options)}{closest(option, options)}"


def _bad_override(error: ConfigCompositionException, *, choices: Callable[[], dict[str, str]]) -> str:
    """The message for an unknown key, a value of the wrong type, an unknown group, or a missing experiment."""
    cause = error.__cause__
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and cause.full_key:
        return unknown_key(cause.full_key, _fields_of(cause.object_type) or GROUPS, choices=choices())
    if isinstance(cause, ValidationError):
        return f"{cause.full_key!s}: {_first_line(cause)}{_expected(cause)}"
    message = _first_line(error)
    found = re.match(r"In 'experiment/([^']+)'.*full_key: (\S+)", str(error), re.DOTALL)
    if found:
        experiment, key = found.groups()
        group = key.partition(".")[0]
        others = options_with(key, group)
        remedy = f"; give {group}={listed(others)}" if others else ""
        return f"experiment={experiment} sets {key}, which the chosen {group} does not have{remedy}"
    if "Could not override" in message and "'" in message:
        key = message.split("'")[1].split("@")[0]
        return f"{key} is not known; the groups are {', '.join(GROUPS)}{closest(key, GROUPS)}"
    if "You must specify 'experiment'" in message:
        return f"no experiment is chosen; give experiment=NAME with one of {', '.join(experiments())}"
    return message


def _fields_of(schema: Any) -> list[str]:
    return [f.name for f in fields(schema)] if schema is not None and is_dataclass(schema) else []


def _expected(error: ValidationError) -> str:
    """The declared type of the field and its default; empty if the error does not name the field."""
    name = (error.full_key or "").rpartition(".")[2].partition("[")[0]
    for each in fields(error.object_type) if is_dataclass(error.object_type) else ():
        if each.name == name:
            kind = each.type if isinstance(each.type, str) else getattr(each.type, "__name__", str(each.type))
            default = each.default if each.default is not MISSING_DEFAULT else ""
            return f"; expected {kind}" + (f", as in {error.full_key}={default}" if default not in ("", None) else "")
    return ""


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
