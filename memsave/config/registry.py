"""The registry: data sets, models and tasks by group and name.

    @register("data", "sst2")
    @dataclass
    class Sst2Data(TextData):
        kind: str = "sst2"

makes `data=sst2` an option on the command line. The class is the schema of the option: its fields are the keys
`data.*`, with the constraints of `memsave.config.option`. Its `validate()`, if it has one, runs after their check.

`load_components` imports every module that registers a component: the modules of memsave that contain `@register(`, and
the entry points of other packages in the group `memsave.components` (see docs/extending.md).
"""

import importlib
import re
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore

from memsave.config.errors import ConfigError

GROUPS = ("experiment", "task", "data", "model", "adapter", "memory", "privacy", "audit", "trainer", "profiler")
"""The config groups of a run, as on the command line."""
ENTRY_POINTS = "memsave.components"
PACKAGES = ("config", "data", "models", "tasks")
"""Packages of memsave that hold components."""
REGISTERED = re.compile(r"^@register\(", re.MULTILINE)

Class = TypeVar("Class", bound=type)
_components: dict[tuple[str, str], type] = {}
_experiments: set[str] = set()


def register(group: str, name: str) -> Callable[[Class], Class]:
    """A class decorator that registers the class as option `name` of a config group.

    Raises ConfigError if another class has the name.
    """

    def add(component: Class) -> Class:
        existing = _components.get((group, name))
        if existing is not None and (existing.__module__, existing.__qualname__) != (
            component.__module__,
            component.__qualname__,
        ):
            raise ConfigError(
                f"{group}={name} is registered by {existing.__module__}.{existing.__qualname__}; "
                f"{component.__module__}.{component.__qualname__} needs another name"
            )
        _components[group, name] = component
        if group in GROUPS:
            store = ConfigStore.instance()
            store.store(group=group, name=f"{name}_schema", node=component)
            if not (conf_dir() / group / f"{name}.yaml").is_file():
                store.store(group=group, name=name, node=component)
        return component

    return add


def register_experiment(name: str, *, defaults: Mapping[str, str], **settings: Any) -> None:
    """Add `experiment=NAME` without a YAML file.

    Args:
        name: the name of the experiment.
        defaults: the option of each config group, as in {"data": "points", "model": "line"}.
        settings: other keys of the config, as in trainer={"steps": 100}.
    """
    chosen = [{f"override /{group}": option} for group, option in defaults.items()]
    node = {"defaults": [*chosen, "_self_"], **settings}
    ConfigStore.instance().store(group="experiment", name=name, node=node, package="_global_")
    _experiments.add(name)


def experiments() -> list[str]:
    """The names of all experiments, sorted: YAML files of `conf/`, and those of `register_experiment`."""
    load_components()
    return sorted({path.stem for path in (conf_dir() / "experiment").glob("*.yaml")} | _experiments)


def component(group: str, name: str) -> type:
    """The class that is registered under a group and a name. Raises KeyError if there is none."""
    load_components()
    return _components[group, name]


def names(group: str) -> list[str]:
    """The names that are registered in a group, sorted."""
    load_components()
    return sorted(name for each, name in _components if each == group)


def options(group: str) -> dict[str, type]:
    """The options of a config group and their schemas: YAML files in conf/, and classes without a YAML file."""
    found: dict[str, type] = {}
    for path in sorted((conf_dir() / group).glob("*.yaml")):
        schema = re.search(r"^  - (\w+)_schema$", path.read_text(), re.MULTILINE)
        if schema:
            found[path.stem] = component(group, schema.group(1))
    written = set(found.values())
    outside = {name: component(group, name) for name in names(group)}
    return found | {name: schema for name, schema in outside.items() if schema not in written}


@cache
def load_components() -> None:
    """Import every module that registers a component, of memsave and of installed packages.

    Raises ConfigError, which names the package, if the module of an entry point cannot be imported.
    """
    root = Path(__file__).resolve().parents[1]
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            if REGISTERED.search(path.read_text(encoding="utf-8")):
                importlib.import_module(".".join(["memsave", *path.relative_to(root).with_suffix("").parts]))
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:
            package = entry.dist.name if entry.dist else entry.module
            raise ConfigError(
                f"the package {package} extends memsave by {entry.value}, which cannot be imported "
                f"({type(error).__name__}: {error}); repair or uninstall it"
            ) from error


@cache
def conf_dir() -> Path:
    """The folder `conf/`: next to the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "conf", package / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"no conf/ folder was found beside or inside {package}; install memsave again")
