"""All private API of PyTorch that `memsave.reversible` uses, in one place; tests/reversible/test_torch_internals.py."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

Function = TypeVar("Function", bound=Callable[..., Any])

HOOK_REGISTRIES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def uncompiled(function: Function) -> Function:
    """A decorator: torch.compile breaks the graph at calls of the function and does not compile what they call.

    `torch.compiler.disable` does the same, but imports the compiler already where it decorates: two seconds.
    """
    return torch._disable_dynamo(function)  # type: ignore[return-value]


def version_of(tensor: Tensor) -> int | None:
    """The number of in-place changes so far; None for an inference tensor, which does not count them.

    No public API tells whether a tensor was changed in place.
    """
    return None if tensor.is_inference() else tensor._version


def storage_id(tensor: Tensor) -> int:
    """The address of the tensor's storage object; FakeTensors and empty tensors have no useful `data_ptr`."""
    return tensor.untyped_storage()._cdata


def tensor_registries(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters, buffers) of the module itself, None entries included; setattr would check and register again."""
    return module._parameters, module._buffers


def has_running_statistics(module: nn.Module) -> bool:
    """Whether the module is a BatchNorm or InstanceNorm: the two have no public base class."""
    return isinstance(module, _NormBase)


def is_shard(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor, in whose place FSDP registers another one while the module runs."""
    return "DTensor" in (type(tensor).__name__, type(tensor.data).__name__)


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on the module: its class is then another one; importing FSDP takes time."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def hooks_of(module: nn.Module) -> Iterator[Any]:
    """The forward and backward hooks registered on the module; there is no public way to list them."""
    for registry in HOOK_REGISTRIES:
        yield from vars(module)[registry].values()
