"""Classes that a config or a model's file names: imported from Python's path alone, and only of the expected kind."""

import importlib
import importlib.util
import inspect
import json
from pathlib import Path

from memsave.config import ConfigError
from memsave.files import parse_json

OF_A_RUN = ("model.safetensors", "result.json", "metrics.jsonl")
"""Files that are in the folder of a run, or of a released model."""


OWN_CLASS = "own_class.json"
"""Beside the weights of a released language model: the name of its class, unless it is one of transformers."""


def write_own_class(cls: type, folder: Path) -> None:
    """Write the name of a class that is none of transformers or memsave."""
    if cls.__module__.partition(".")[0] not in ("transformers", "memsave"):
        (folder / OWN_CLASS).write_text(json.dumps({"target": f"{cls.__module__}.{cls.__qualname__}"}) + "\n")


def read_own_class(folder: Path) -> str | None:
    """The name of the class of a released model; None if it is one of transformers. Raises ConfigError."""
    path = folder / OWN_CLASS
    if not path.is_file():
        return None
    try:
        return str(parse_json(path.read_text())["target"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); copy the model's folder again") from error


def import_class(target: str, base: type) -> type:
    """The class of a name such as my_package.networks.MyNet. Raises ConfigError unless it derives from `base`.

    A stranger's file can therefore name no other function, and code that lies in the folder of a run or of a model is
    refused before it runs, even if a command was started there.
    """
    module, _, name = target.rpartition(".")
    if not module:
        raise ConfigError(f"model.target is {target!r}; give PACKAGE.CLASS, such as my_networks.MyNet")
    _refuse_code_of_a_run(target)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"model.target={target} cannot be imported ({error}); give a class of an installed package, or of a file "
            f"in the working folder"
        ) from error
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise ConfigError(f"model.target={target} is no class derived from {base.__module__}.{base.__name__}; give one")
    return found


def _refuse_code_of_a_run(target: str) -> None:
    """Raise ConfigError if the code would come from a run's or a model's folder, whoever made it: it runs at import."""
    spec = importlib.util.find_spec(target.partition(".")[0])
    if spec is None or spec.origin is None:
        return
    for folder in list(Path(spec.origin).resolve().parents)[:3]:
        if any((folder / name).is_file() for name in OF_A_RUN):
            raise ConfigError(
                f"model.target={target} would run code from {folder}, which is the folder of a run or of a model; read "
                f"it, and put it into the folder from which you start, or install it"
            )
