"""How results are written, and the versions and the machine that they depend on."""

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


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    draft = path.with_name(path.name + ".new")
    try:
        draft.write_text(json.dumps(content, indent=2) + "\n")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def read_result(folder: Path) -> dict[str, Any]:
    """`result.json` of a run's folder; empty where there is none, or one that was not written to its end."""
    path = folder / "result.json"
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_config(folder: Path) -> dict[str, Any]:
    """`config.yaml` of a run's folder; empty where there is none, or one that cannot be read."""
    path = folder / "config.yaml"
    try:
        found: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}
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
    """Write `config.yaml`. Its first lines keep the request, see `request_of`, and the name of the experiment.

    Both stay as they are in the file where they are not given.
    """
    path = folder / "config.yaml"
    found = config if isinstance(config, DictConfig) else OmegaConf.structured(config)
    notes = {"request": request or requested_in(folder), "experiment": experiment or experiment_in(folder)}
    first = "".join(f"# {key} {value}\n" for key, value in notes.items() if value is not None)
    version = f"{VERSION_KEY}: {VERSION}\n"
    path.write_text(first + version + OmegaConf.to_yaml(found, resolve=True))


def request_of(config: DictConfig) -> str:
    """A digest of a composed config, by which a sweep that is run again knows its jobs."""
    return hashlib.sha256(OmegaConf.to_yaml(config, resolve=True).encode()).hexdigest()[:16]


def requested_in(folder: Path) -> str | None:
    """The digest of what a run's folder was made for; None where it holds no run."""
    return _note_in(folder, "request")


def experiment_in(folder: Path) -> str | None:
    """The name of the experiment of a run's folder; None where it is not noted."""
    return _note_in(folder, "experiment")


def _note_in(folder: Path, key: str) -> str | None:
    """What stands behind `# key ` in the first lines of `config.yaml`."""
    path = folder / "config.yaml"
    for line in path.read_text(errors="replace").splitlines()[:2] if path.is_file() else []:
        if line.startswith(f"# {key} "):
            return line.removeprefix(f"# {key} ").strip()
    return None


def flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested mappings."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {"memsave": __version__, "torch": torch.__version__, "python": platform.python_version()}


def hardware() -> dict[str, Any]:
    """The machine that a measured number belongs to."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": _cpu_name(), "threads": torch.get_num_threads(), "gpu": gpu, "system": platform.system()}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
