"""The files `result.json` and `config.yaml` of a run, and the versions and hardware that results depend on."""

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from memsave._version import __version__
from memsave.config import Config
from memsave.config.compose import VERSION, VERSION_KEY
from memsave.config.yaml_files import read_yaml
from memsave.files import parse_json, replacing


def read_result(folder: Path) -> dict[str, Any]:
    """`result.json` of a run's folder; empty if it is missing or incomplete."""
    path = folder / "result.json"
    try:
        found = parse_json(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_config(folder: Path) -> dict[str, Any]:
    """`config.yaml` of a run's folder; empty if it is missing or unreadable."""
    path = folder / "config.yaml"
    try:
        found: Any = OmegaConf.to_container(read_yaml(path)) if path.is_file() else {}
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):
        return {}
    return found if isinstance(found, dict) else {}


def append_line(path: Path, content: Mapping[str, Any]) -> None:
    """Append one JSON object as one line."""
    with path.open("a") as file:
        file.write(json.dumps(content) + "\n")


def write_config(
    config: Config | DictConfig, folder: Path, *, request: str | None = None, experiment: str | None = None
) -> None:
    """Write `config.yaml`, with the request digest (`request_digest`) and the experiment's name in its first lines.

    Arguments that are None keep the values of the existing file.
    """
    path = folder / "config.yaml"
    found = config if isinstance(config, DictConfig) else OmegaConf.structured(config)
    notes = {"request": request or read_request(folder), "experiment": experiment or read_experiment(folder)}
    first = "".join(f"# {key} {value}\n" for key, value in notes.items() if value is not None)
    version = f"{VERSION_KEY}: {VERSION}\n"
    with replacing(path) as draft:
        draft.write_text(first + version + OmegaConf.to_yaml(found, resolve=True))


def request_digest(config: DictConfig) -> str:
    """A digest of a composed config; a repeated sweep finds its finished jobs by it."""
    return hashlib.sha256(OmegaConf.to_yaml(config, resolve=True).encode()).hexdigest()[:16]


def read_request(folder: Path) -> str | None:
    """The request digest in a run's folder; None if the folder holds no run."""
    return _note_in(folder, "request")


def read_experiment(folder: Path) -> str | None:
    """The name of the experiment in a run's folder; None if it is not recorded."""
    return _note_in(folder, "experiment")


def _note_in(folder: Path, key: str) -> str | None:
    """The value of the comment `# key value` in the first lines of `config.yaml`."""
    path = folder / "config.yaml"
    for line in path.read_text(errors="replace").splitlines()[:2] if path.is_file() else []:
        if line.startswith(f"# {key} "):
            return line.removeprefix(f"# {key} ").strip()
    return None


def flatten(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested mappings."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {"memsave": __version__, "torch": torch.__version__, "python": platform.python_version()}


def hardware() -> dict[str, Any]:
    """The hardware on which a number was measured."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": _cpu_name(), "threads": torch.get_num_threads(), "gpu": gpu, "system": platform.system()}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
