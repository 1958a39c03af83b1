"""Checkpoints: the state of a run as safetensors and JSON.

    checkpoint/model.safetensors       trainable parameters, and buffers, of the model
    checkpoint/optimizer.safetensors   optimizer state as "parameter name/state name", and the random states
    checkpoint/state.json              the step, the optimizer's name and numbers, the counts of private training, and
                                       the CRC-32 of the two other files, which finds damage to them

A checkpoint replaces the last one atomically, and the last one stays as `checkpoint.previous`: a run that is killed at
any moment leaves a complete checkpoint. The checkpoint of a private run reveals its noise and must stay secret.

In several processes, rank 0 writes it, with the random states of all; another number of processes can continue it. All
processes must see the folder. Of a sharded model, each process writes its part by torch.distributed.checkpoint:

    checkpoint/shards/                 parameters, buffers, optimizer state and average, in place of the tensors above
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from memsave.files import (
    PREVIOUS,
    checksum,
    draft_of,
    drop_draft,
    finish_draft,
    newest_folder,
    parse_json,
    replace_folder,
    start_draft,
)
from memsave.offload import finish_copies, keep_state_offloaded
from memsave.privacy import PrivacyError
from memsave.privacy.gradients import refuse_other_generators
from memsave.processes import gather, is_sharded, on_main, process_count, process_rank, together
from memsave.random_state import get_random_state, set_random_state
from memsave.training import shards
from memsave.training.loop import State
from memsave.training.sharding import copy_shard, is_sharded_model

NAME = "checkpoint"
RANDOM, PRIVATE, EMA, MODEL, OPTIMIZER = "random/", "private/", "ema/", "model/", "optimizer/"
SHARDS = "shards"
REPLACED = ".original_module."  # modules that PEFT keeps beside their trained copies and does not use
SECRET = """This folder is as secret as the training data: it holds the state of the random generators that draw the
noise and the batches. Only the folder model/ may be released.
"""


class CheckpointError(ValueError):
    """A checkpoint that cannot be continued; the message is one sentence."""


def save(state: State, folder: Path) -> None:
    """Write the state to `folder` and replace the checkpoint there; all processes must call it together."""
    random = _random_states(state.model)
    private = None if state.private is None else state.private.state_dict()
    if not is_sharded_model(state.model):
        on_main(replace_folder, folder, lambda draft: _write(state, draft, random=random, private=private))
        return
    on_main(start_draft, folder)
    try:
        shards.write(_tensors(state), draft_of(folder) / SHARDS)
        on_main(_write, state, draft_of(folder), random=random, private=private)
        on_main(finish_draft, folder)
    except BaseException:
        if process_rank() == 0:
            drop_draft(folder)
        raise


def _tensors(state: State) -> dict[str, Tensor]:
    """The tensors that a sharded model has in parts: "model/NAME", "optimizer/NAME/STATE" and "ema/NAME"."""
    optimizer, _ = _optimizer_state(state)
    average = {} if state.ema is None else state.ema.average
    return {
        **{MODEL + name: tensor for name, tensor in _unique_tensors(state.model).items()},
        **{OPTIMIZER + key: tensor for key, tensor in optimizer.items()},
        **{EMA + name: tensor for name, tensor in average.items()},
    }


def _random_states(model: nn.Module) -> dict[str, Tensor]:
    """The states of the default generators of all processes, as "random/cpu" of rank 0 and "random/1/cpu" of rank 1."""
    named = {}
    for rank, states in enumerate(gather(get_random_state(model))):
        named.update({f"{RANDOM}{_of_rank(rank)}{kind}": each for kind, each in states.items()})
    return named


def _of_rank(rank: int) -> str:
    return f"{rank}/" if rank else ""


def _restore_random_state(model: nn.Module, states: dict[str, Tensor]) -> None:
    """Set the generators of this process; they stay as they are if the checkpoint has none for its rank."""
    prefix = _of_rank(process_rank())
    own = {key.removeprefix(prefix): each for key, each in states.items() if key.startswith(prefix)}
    own = {key: each for key, each in own.items() if "/" not in key}
    if own:
        set_random_state(model, own)


def _write(state: State, folder: Path, *, random: dict[str, Tensor], private: dict[str, Any] | None) -> None:
    tensors, numbers = _optimizer_state(state)
    average = {} if state.ema is None else {EMA + name: tensor for name, tensor in state.ema.average.items()}
    if is_sharded_model(state.model):
        tensors, average = {}, {}
    else:
        save_file(_unique_tensors(state.model), folder / "model.safetensors")
    content = {
        "step": state.step,
        "run": state.run,
        "processes": state.processes,
        "data": state.data,
        "optimizer": type(state.optimizer).__name__,
        "numbers": numbers,
        "identity": state.identity,
        "frozen": state.frozen,
        "best": state.best,
        "scaler": None if state.scaler is None else state.scaler.state_dict(),
        "private": None,
    }
    if private is not None:
        private = dict(private)
        generators = {PRIVATE + key: private.pop(key) for key in list(private) if isinstance(private[key], Tensor)}
        content["private"], tensors = private, {**tensors, **generators}
        (folder / "SECRET.txt").write_text(SECRET)
    save_file({**tensors, **average, **random}, folder / "optimizer.safetensors")
    content["checksums"] = {path.name: checksum(path) for path in sorted(folder.glob("*.safetensors"))}
    (folder / "state.json").write_text(json.dumps(content, indent=2) + "\n")


def load(state: State, folder: Path) -> None:
    """Restore what `save` wrote into `state`; all processes must call it together.

    `folder` is the checkpoint's folder or the run's. Raises CheckpointError if the checkpoint is missing, unreadable
    or of another run.
    """
    with together():
        folder = _checkpoint_in(folder)
        content, tensors = _read(folder)
    if (folder / SHARDS).is_dir():
        try:
            tensors |= shards.read(folder / SHARDS, like=_tensors(state), others=_optimizer_tensor_like(state))
        except (OSError, EOFError, ValueError, RuntimeError, UnpicklingError) as error:
            raise _unreadable(folder, error) from error
    with together():
        try:
            _restore(state, content, tensors, folder=folder)
        except (CheckpointError, PrivacyError):
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:  # a value of another type
            raise _unreadable(folder, error) from error


def _restore(state: State, content: dict[str, Any], tensors: dict[str, Tensor], *, folder: Path) -> None:
    model = _take(tensors, MODEL)
    _check_model(model, expected=_unique_tensors(state.model), folder=folder)
    _check_run(state, content, folder=folder)
    if content.get("frozen") != state.frozen:
        raise CheckpointError(
            f"the checkpoint in {folder} is of a model with other frozen weights; continue with the same base model"
        )
    generators = _take(tensors, PRIVATE)
    if state.private is not None:
        refuse_other_generators(generators)
        _check_kinds(content["private"], like=state.private.state_dict())
        state.private.load_state_dict({**content["private"], **generators})
    for name, tensor in _unique_tensors(state.model).items():
        copy_shard(tensor, model[name])
    average = _take(tensors, EMA)
    if state.ema is not None:
        for name, tensor in state.ema.average.items():
            copy_shard(tensor, average.get(name, model.get(name, tensor)))
    if state.scaler is not None and content["scaler"]:
        state.scaler.load_state_dict(content["scaler"])
    best = content["best"]
    state.best = None if best is None else (float(best[0]), int(best[1]))
    _restore_random_state(state.model, _take(tensors, RANDOM))
    _restore_optimizer(state, _take(tensors, OPTIMIZER), content["numbers"])
    state.step = content["step"]
    state.run = content.get("run") or state.run
    before = content.get("processes", [1])
    state.processes = before if before[-1] == process_count() else [*before, process_count()]
    _restore_schedule(state)


def read_noise_multiplier(folder: Path) -> float | None:
    """The noise multiplier in the checkpoint of a private run, given its folder or the run's; None if there is none."""
    try:
        return float(read_state(folder)["private"]["mechanism"]["noise_multiplier"])
    except (ValueError, KeyError, TypeError):
        return None


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of the checkpoint, given its folder or the run's; empty if it is missing or unreadable."""
    try:
        found = parse_json((_checkpoint_in(folder) / "state.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _checkpoint_in(folder: Path) -> Path:
    """The newest complete checkpoint, given its own folder or the run's."""
    if not (folder / "state.json").is_file() and any((folder / name).exists() for name in (NAME, NAME + PREVIOUS)):
        folder = folder / NAME  # the run's folder
    return newest_folder(folder)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(content of state.json, tensors by the keys of `_tensors`, and those of generators)."""
    if not (folder / "state.json").is_file():
        raise CheckpointError(f"there is no checkpoint in {folder}; name a run's folder, or its checkpoint/")
    try:
        content = parse_json((folder / "state.json").read_text())
        content["step"] = int(content["step"])
        for key in ("optimizer", "numbers", "private", "identity", "best"):
            content[key]
        for name, expected in content.get("checksums", {}).items():  # older versions wrote none
            if checksum(folder / Path(name).name) != expected:
                raise ValueError(f"{name} is damaged: its CRC-32 is not that of state.json")
        path = folder / "model.safetensors"
        model = {} if (folder / SHARDS).is_dir() else {MODEL + name: each for name, each in load_file(path).items()}
        others = load_file(folder / "optimizer.safetensors")
        named = (EMA, RANDOM, PRIVATE)
        return content, model | {
            key if key.startswith(named) else OPTIMIZER + key: each for key, each in others.items()
        }
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> CheckpointError:
    previous = folder.with_name(folder.name + PREVIOUS)
    other = f"the previous one, {previous}" if previous.exists() else "another"
    return CheckpointError(f"the checkpoint in {folder} cannot be read ({error}); continue from {other}")


def _check_model(model: dict[str, Tensor], *, expected: dict[str, Tensor], folder: Path) -> None:
    wrong = [name for name in expected if name not in model or model[name].shape != expected[name].shape]
    wrong += [name for name in model if name not in expected]
    if wrong:
        raise CheckpointError(
            f"the checkpoint in {folder} is of another model ({wrong[0]} differs); give the config it was made with"
        )


def _check_run(state: State, content: dict[str, Any], *, folder: Path) -> None:
    """Refuse the checkpoint of a run with another optimizer, other data or another privacy setting."""
    optimizer = type(state.optimizer).__name__
    if content["optimizer"] != optimizer:
        raise CheckpointError(
            f"the checkpoint in {folder} is of the optimizer {content['optimizer']}, not {optimizer}; give the "
            f"trainer.optimizer.name it was made with"
        )
    for key, value in state.identity.items():
        found = content["identity"].get(key, value)
        if found != value:
            raise CheckpointError(
                f"the checkpoint in {folder} is of a run with another {key} ({found}, here {value}), which changes the "
                f"batches; continue with the same {key}"
            )
    if (content["private"] is None) != (state.private is None):
        raise CheckpointError(
            f"the checkpoint in {folder} is of a run {'without' if content['private'] is None else 'with'} privacy; "
            f"continue with the same privacy=, because all steps are accounted for together"
        )


def _check_kinds(found: Any, *, like: Mapping[str, Any]) -> None:
    """Raise ValueError unless `found` has a value of the same kind for each entry of `like` that is no tensor."""
    for key, expected in like.items():
        value: Any = None if isinstance(expected, Tensor) else found[key]
        if isinstance(expected, dict):
            _check_kinds(value, like=expected)
        elif isinstance(expected, float):
            float(value)
        elif isinstance(expected, (int, str)) and type(value) is not type(expected):
            raise ValueError(f"{key} is {value!r}")


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove the tensors whose keys start with `prefix` and return them without it."""
    return {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}


def _unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters and buffers by name; a tensor with several names is listed under the first one."""
    named: dict[str, Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
            continue
        key = (id(tensor) if is_sharded(tensor) else tensor.data_ptr(), tuple(tensor.shape))
        tensor = tensor.detach()
        if not tensor.numel() or key not in seen:
            named[name] = tensor.contiguous()
            seen.add(key)
    return named


def digest_of_frozen(model: nn.Module) -> str | None:
    """A digest of the frozen parameters, which a checkpoint does not hold; None if all parameters train."""
    digest, found = hashlib.sha256(), False
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and REPLACED not in name:
            content: Any = parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            digest.update(content)
            found = True
    return digest.hexdigest() if found else None


def _optimizer_state(state: State) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, other values) of the optimizer's state, both keyed by "parameter name/state name"."""
    finish_copies(state.optimizer)
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
        name, _, state_name = key.rpartition("/")
        parameter = parameters[name]
        if isinstance(value, Tensor) and value.dim():
            like = torch.zeros_like(parameter, dtype=value.dtype)
            copy_shard(like, value)
            value = like
        state.optimizer.state[parameter][state_name] = value
        keep_state_offloaded(state.optimizer, parameter)


def _optimizer_tensor_like(state: State) -> Callable[[str, torch.Size], Tensor]:
    """By key and shape, a tensor for one of the optimizer's: with the shards of its parameter, or whole."""
    parameters = dict(state.model.named_parameters())

    def like(key: str, shape: torch.Size) -> Tensor:
        name = key.removeprefix(OPTIMIZER).rpartition("/")[0]
        found = parameters.get(name)
        return torch.zeros(shape) if found is None or found.shape != shape else torch.zeros_like(found)

    return like


def _restore_schedule(state: State) -> None:
    """Set the learning rates from the step and this run's schedule, not from the checkpoint."""
    schedule = state.schedule
    schedule.last_epoch = state.step
    for group, base, factor in zip(state.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * factor(state.step)
