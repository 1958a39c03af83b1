"""A run's state as safetensors and JSON, in a folder that is whole or not there.

    checkpoint/model.safetensors       the model's parameters and buffers
    checkpoint/optimizer.safetensors   the optimizer's tensors, as "parameter name/state name", and the random states
    checkpoint/state.json              the step, the optimizer's name and numbers, and the private mechanism's counts

A checkpoint is written beside the last one and then takes its place, so that a run killed at any moment leaves one; the
last one stays as `checkpoint.previous`. That of a private run foretells its noise: it is as secret as the data.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from memsave.random_state import get_random_state, set_random_state
from memsave.training.loop import State

NAME = "checkpoint"
RANDOM, PRIVATE, EMA, PREVIOUS = "random/", "private/", "ema/", ".previous"
SECRET = """This folder is as secret as the training data: it holds the state of the generators that noise and batches
are drawn from. What may be handed on is the folder model/.
"""


class CheckpointError(ValueError):
    """A checkpoint that cannot be continued from; the message is one sentence."""


def save(state: State, folder: Path) -> None:
    """Write the state to `folder`, replacing the checkpoint there."""
    new, previous = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + PREVIOUS)
    if previous.exists() and not folder.exists():
        previous.rename(folder)  # killed between the two renames below: this is the last whole one
    shutil.rmtree(new, ignore_errors=True)
    try:
        _write(state, new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)  # on a full disk it would leave no room for the run's result
        raise
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    new.rename(folder)
    _flush(folder.parent)


def _write(state: State, new: Path) -> None:
    new.mkdir(parents=True)
    save_file(_named_once(state.model), new / "model.safetensors")
    tensors, numbers = _optimizer_state(state)
    random = {RANDOM + kind: random for kind, random in get_random_state(state.model).items()}
    content = {
        "step": state.step,
        "optimizer": type(state.optimizer).__name__,
        "numbers": numbers,
        "identity": state.identity,
        "best": state.best,
        "scaler": None if state.scaler is None else state.scaler.state_dict(),
        "private": None,
    }
    if state.private is not None:
        private = state.private.state_dict()
        generators = {PRIVATE + key: private.pop(key) for key in list(private) if isinstance(private[key], Tensor)}
        content["private"], tensors = private, {**tensors, **generators}
        (new / "SECRET.txt").write_text(SECRET)
    average = {} if state.ema is None else {EMA + name: tensor for name, tensor in state.ema.average.items()}
    save_file({**tensors, **average, **random}, new / "optimizer.safetensors")
    (new / "state.json").write_text(json.dumps(content, indent=2) + "\n")
    for path in (*new.iterdir(), new):
        _flush(path)


def load(state: State, folder: Path) -> None:
    """Put the state into what `save` wrote, given its folder or the run's; CheckpointError when it does not fit."""
    folder = _found(folder)
    if not (folder / "state.json").is_file():
        raise CheckpointError(f"there is no checkpoint in {folder}; name a run's folder, or its checkpoint/")
    try:
        content = json.loads((folder / "state.json").read_text())
        step, optimizer, numbers = int(content["step"]), content["optimizer"], content["numbers"]
        private, identity, best = content["private"], content["identity"], content["best"]
        model = load_file(folder / "model.safetensors")
        tensors = load_file(folder / "optimizer.safetensors")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        previous = folder.with_name(folder.name + PREVIOUS)
        other = f"{previous}, the one before" if previous.exists() else "another"
        raise CheckpointError(f"the checkpoint in {folder} cannot be read ({error}); continue from {other}") from error
    expected = _named_once(state.model)
    wrong = [name for name in expected if name not in model or model[name].shape != expected[name].shape]
    wrong += [name for name in model if name not in expected]
    if wrong:
        raise CheckpointError(
            f"the checkpoint in {folder} is of another model ({wrong[0]} differs); give the config it was made with"
        )
    if optimizer != type(state.optimizer).__name__:
        raise CheckpointError(
            f"the checkpoint in {folder} is of the optimizer {optimizer}, not {type(state.optimizer).__name__}; give "
            f"the trainer.optimizer.name it was made with"
        )
    for key, value in state.identity.items():
        if identity.get(key, value) != value:
            raise CheckpointError(
                f"the checkpoint in {folder} is of a run with another {key} ({identity[key]}, here {value}), and the "
                f"batches follow from it; continue with the same"
            )
    if (private is None) != (state.private is None):
        raise CheckpointError(
            f"the checkpoint in {folder} is of a run {'without' if private is None else 'with'} privacy; continue with "
            f"the same privacy=, for what it spent is accounted for together"
        )
    generators = {key.removeprefix(PRIVATE): tensors.pop(key) for key in list(tensors) if key.startswith(PRIVATE)}
    if state.private is not None:
        state.private.load_state_dict({**private, **generators})
    state.model.load_state_dict(model, strict=False)  # tied parameters have one name of several
    average = {key.removeprefix(EMA): tensors.pop(key) for key in list(tensors) if key.startswith(EMA)}
    if state.ema is not None:
        for name, tensor in state.ema.average.items():
            tensor.copy_(average.get(name, model.get(name, tensor)))
    if state.scaler is not None and content["scaler"]:
        state.scaler.load_state_dict(content["scaler"])
    state.best = None if best is None else (best[0], best[1])
    random = {key.removeprefix(RANDOM): tensors.pop(key) for key in list(tensors) if key.startswith(RANDOM)}
    set_random_state(state.model, random)
    _restore_optimizer(state, tensors, numbers)
    state.step = step
    _restore_schedule(state)


def noise_multiplier_in(folder: Path) -> float | None:
    """That of a private run's checkpoint, given its folder or the run's; None where there is none to be read."""
    try:
        private = json.loads((_found(folder) / "state.json").read_text())["private"]
        return None if private is None else float(private["mechanism"]["noise_multiplier"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _found(folder: Path) -> Path:
    """The checkpoint's folder, of a run's folder or of itself, whichever of the two kept ones is whole."""
    if not (folder / "state.json").is_file() and any((folder / name).exists() for name in (NAME, NAME + PREVIOUS)):
        folder = folder / NAME  # the run's folder
    previous = folder.with_name(folder.name + PREVIOUS)
    return previous if previous.exists() and not folder.exists() else folder  # killed between the two renames


def _named_once(model: nn.Module) -> dict[str, Tensor]:
    """Its parameters and buffers; what has several names stands under the first one."""
    named: dict[str, Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if not tensor.numel() or key not in seen:
            named[name] = tensor.contiguous()
            seen.add(key)
    return named


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


def _restore_schedule(state: State) -> None:
    """The schedule follows from the step and from this run's own settings."""
    schedule = state.schedule
    schedule.last_epoch = state.step
    for group, base, factor in zip(state.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * factor(state.step)


def _flush(path: Path) -> None:
    """Have the system write a file, or a folder's entries, to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
