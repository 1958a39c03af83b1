"""A run's state as safetensors and JSON, in a folder that is whole or not there.

    checkpoint/model.safetensors       the model's parameters and buffers
    checkpoint/optimizer.safetensors   the optimizer's tensors, as "parameter name/state name", and the random states
    checkpoint/state.json              the step, the schedule, the optimizer's numbers

A checkpoint is written beside the last one and then takes its place, so that a run killed at any moment leaves one.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from memsave.training.loop import State

RANDOM = "random/cpu"


class CheckpointError(ValueError):
    """A checkpoint that cannot be continued from; the message is one sentence."""


def save(state: State, folder: Path) -> None:
    """Write the state to `folder`, replacing the checkpoint there."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    model = {name: tensor.contiguous() for name, tensor in state.model.state_dict().items()}
    save_file(model, new / "model.safetensors")
    tensors, numbers = _optimizer_state(state)
    save_file({**tensors, RANDOM: torch.get_rng_state()}, new / "optimizer.safetensors")
    rates = [group["lr"] for group in state.optimizer.param_groups]
    schedule = {"steps": state.schedule.last_epoch, "lr": rates}
    content = {"step": state.step, "optimizer": numbers, "schedule": schedule}
    (new / "state.json").write_text(json.dumps(content, indent=2) + "\n")
    for path in new.iterdir():
        _flush(path)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load(state: State, folder: Path) -> None:
    """Put the state into what `save` wrote; CheckpointError when it does not fit."""
    if not folder.exists() and folder.with_name(folder.name + ".old").exists():
        folder = folder.with_name(folder.name + ".old")  # killed between the two renames
    if not (folder / "state.json").is_file():
        raise CheckpointError(f"there is no checkpoint in {folder}; name a run's checkpoint/ folder")
    try:
        content = json.loads((folder / "state.json").read_text())
        model = load_file(folder / "model.safetensors")
        tensors = load_file(folder / "optimizer.safetensors")
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"the checkpoint in {folder} cannot be read ({error}); continue from another") from error
    expected = state.model.state_dict()
    wrong = [name for name in expected if name not in model or model[name].shape != expected[name].shape]
    wrong += [name for name in model if name not in expected]
    if wrong:
        raise CheckpointError(
            f"the checkpoint in {folder} is of another model ({wrong[0]} differs); give the config it was made with"
        )
    state.model.load_state_dict(model)
    torch.set_rng_state(tensors.pop(RANDOM))
    _restore_optimizer(state, tensors, content["optimizer"])
    state.step = content["step"]
    state.schedule.last_epoch = content["schedule"]["steps"]
    for group, rate in zip(state.optimizer.param_groups, content["schedule"]["lr"], strict=True):
        group["lr"] = rate


def _optimizer_state(state: State) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, other values) of the optimizer's state, each by "parameter name/state name"."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in state.model.named_parameters()}
    entries = {
        f"{names[parameter]}/{key}": value
        for parameter, values in state.optimizer.state.items()
        for key, value in values.items()
    }
    tensors = {key: value.contiguous() for key, value in entries.items() if isinstance(value, Tensor)}
    return tensors, {key: value for key, value in entries.items() if key not in tensors}


def _restore_optimizer(state: State, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    parameters = dict(state.model.named_parameters())
    for key, value in {**tensors, **numbers}.items():
        name, _, entry = key.rpartition("/")
        parameter = parameters[name]
        if isinstance(value, Tensor) and value.dim():
            value = value.to(parameter.device)
        state.optimizer.state[parameter][entry] = value


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
