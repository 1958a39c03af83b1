"""What the task asks of a network's config, and `model=custom`: a network of one's own."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from memsave.config import ConfigError, register
from memsave.config.schema import MODES, MemoryConfig, ModelConfig
from memsave.data.volumes.config import SegmentationData
from memsave.models.memory import Checkpointed, check_memory
from memsave.own_code import import_class
from memsave.reversible import ReversibleSequence


class SegmentationModel(ModelConfig):
    """The base of the configs of networks for volumes (B, C, D, H, W)."""

    @property
    def levels(self) -> int | None:
        """How many levels have a memory mode of their own; None if the network has one mode."""
        return None

    def modes(self) -> tuple[str, ...]:
        """The memory modes that the network has."""
        return MODES

    def smaller(self) -> dict[str, Any]:
        """Changes of keys that make the network small enough to calibrate the planner with a real step."""
        return {}

    def family(self) -> str:
        """The part of the key of a calibration that depends on the network."""
        return self.kind

    def build(self, data: SegmentationData, *, memory: MemoryConfig) -> nn.Module:
        """The network with random weights, for the modalities and regions of the data. Raises ConfigError."""
        raise NotImplementedError


@register("model", "custom")
@dataclass
class CustomNetwork(SegmentationModel):
    """A network of your own, a class that can be imported from the working folder or from an installed package."""

    kind: str = "custom"
    target: str = ""
    """The class, as in my_package.networks.MyNet: it maps (B, C, D, H, W) to one logit per region, of the same size."""
    arguments: Any = None
    """Further arguments of the class, as in {width: 32}."""
    inputs: str = "in_channels"
    """The argument that gets the number of modalities."""
    outputs: str = "out_channels"
    """The argument that gets the number of regions."""
    checkpoint: list[str] = field(default_factory=list)
    """memory=checkpoint: names of the modules that are evaluated again in backward, as in [encoder.0, encoder.1]."""

    def validate(self) -> None:
        """Raise ConfigError unless the arguments are a mapping."""
        if not isinstance(self.arguments, Mapping | None):
            raise ConfigError(
                f"model.arguments is {self.arguments}; give a mapping, as in model.arguments={{width:32}}"
            )

    def modes(self) -> tuple[str, ...]:
        """Reversible if it has a `ReversibleSequence`, checkpoint if modules are named."""
        found = ["stored"] + (["checkpoint"] if self.checkpoint else [])
        key = json.dumps({self.inputs: 1, self.outputs: 1, **dict(self.arguments or {})}, sort_keys=True)
        return tuple(found + (["reversible"] if _is_reversible(self.target, key) else []))

    def family(self) -> str:
        """The class and its arguments."""
        return f"{self.kind} {self.target} {json.dumps(dict(self.arguments or {}), sort_keys=True)}"

    def build(self, data: SegmentationData, *, memory: MemoryConfig) -> nn.Module:
        """The network with random weights, with the attribute `memory`. Raises ConfigError."""
        sizes = {self.inputs: len(data.input_modalities()), self.outputs: len(data.label_scheme().names)}
        network = rebuild({"target": self.target, "arguments": {**sizes, **dict(self.arguments or {})}})
        add_modes(network, checkpointed=self.checkpoint)
        try:
            network.memory = memory.mode  # type: ignore[assignment]
        except ValueError as error:
            raise ConfigError(f"memory={memory.mode}: {error}") from error
        return network


def rebuild(found: dict[str, Any]) -> nn.Module:
    """The network of {"target": class, "arguments": its arguments}, with random weights. Raises ConfigError.

    The class comes from Python's path alone, and must be a network: a stranger's file cannot name another function.
    """
    target, arguments = str(found.get("target", "")), dict(found.get("arguments", {}))
    cls = import_class(target, nn.Module)
    try:
        network = cls(**arguments)
    except Exception as error:  # whatever the class raises
        raise ConfigError(
            f"{target}({', '.join(f'{key}={value!r}' for key, value in arguments.items())}) cannot be built "
            f"({type(error).__name__}: {error}); give model.arguments, and the names of its channels by model.inputs "
            f"and model.outputs"
        ) from error
    described: Any = network
    described.memsave_model = {"target": target, "arguments": arguments}  # for `UNetConfig`
    return network


@lru_cache(maxsize=16)
def _is_reversible(target: str, arguments: str) -> bool:
    """Whether the network of these arguments (JSON) has a reversible sequence; it is built without memory."""
    with torch.device("meta"):
        network = rebuild({"target": target, "arguments": json.loads(arguments)})
    return any(isinstance(each, ReversibleSequence) for each in network.modules())


def add_modes(network: Any, *, checkpointed: Sequence[str]) -> None:
    """Give the network the attribute `memory`, unless it has one; it may be changed at any time.

    "checkpoint" evaluates the named modules again in backward; "reversible" lets its reversible sequences rebuild their
    activations. Raises ConfigError for names of no modules.
    """
    modules = dict(network.named_modules())
    for name in checkpointed:
        if name not in modules:
            known = ", ".join(list(modules)[1:6])
            raise ConfigError(f"model.checkpoint names {name}, which is no module of the network; it has {known}, ...")
    if hasattr(network, "memory"):
        return
    own = type(network)
    network.__class__ = type(own.__name__, (own,), {"memory": property(_get_memory, _set_memory)})
    network._memory_mode = "stored"
    network._checkpointed = [Checkpointed(modules[name]) for name in checkpointed]


def _get_memory(network: Any) -> str:
    return str(network._memory_mode)


def _set_memory(network: Any, mode: str) -> None:
    check_memory(mode)
    sequences = [each for each in network.modules() if isinstance(each, ReversibleSequence)]
    if mode == "reversible" and not sequences:
        raise ValueError(
            f"{type(network).__name__} has no memsave.reversible.ReversibleSequence; build one in its __init__, or "
            f"give memory=checkpoint model.checkpoint=[NAMES]"
        )
    if mode == "checkpoint" and not network._checkpointed:
        raise ValueError(f"model.checkpoint=[NAMES] must name modules of {type(network).__name__}")
    for sequence in sequences:
        sequence.recompute = mode == "reversible"
    for each in network._checkpointed:
        each.on = mode == "checkpoint"
    network._memory_mode = mode
