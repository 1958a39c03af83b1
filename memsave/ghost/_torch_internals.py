"""All private or undocumented API of PyTorch that `memsave.ghost` uses, in one place.

A new version of PyTorch may change any of it. `tests/ghost/test_torch_internals.py` has one test for each name below,
and fails where a version no longer does what the package relies on.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # the common base of all batch normalisations
from torch.nn.modules.instancenorm import _InstanceNorm as InstanceNorm  # the common base of all instance norms
from torch.nn.parameter import is_lazy  # no public predicate exists for parameters without a shape
from torch.overrides import TorchFunctionMode  # sees every operator, also those inside modules
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten  # no public function flattens nested arguments
from torch.utils.weak import WeakIdKeyDictionary  # tensors compare by value, so a plain weak dictionary fails

from memsave.processes import is_fully_sharded

__all__ = [
    "BatchNorm",
    "FsdpGroup",
    "FsdpParameter",
    "InstanceNorm",
    "TorchFunctionMode",
    "WeakIdKeyDictionary",
    "convolution_weight_grad",
    "current_backward",
    "forward_pre_hooks",
    "fsdp_groups",
    "gradient_hooks",
    "in_backward",
    "is_batched",
    "is_compiled",
    "is_fake",
    "is_lazy",
    "is_reentrant_checkpoint_error",
    "is_view",
    "leaves_of",
    "leaves_past",
    "non_persistent_buffers",
    "own_buffers",
    "own_children",
    "own_parameters",
    "saved_tensors_are_moved",
    "saved_tensors_are_redirected",
    "storage_id",
    "tensor_hooks",
    "tree_flatten",
    "tree_unflatten",
    "unfollowed",
    "unobserved",
    "version",
    "without_overrides",
]


current_backward: Callable[[], int] = torch._C._current_graph_task_id
"""The number of the backward that runs in this thread, or -1: a backward inside a backward has another number."""


def in_backward() -> bool:
    """Whether a backward runs in this thread: a forward is then a recomputation."""
    return current_backward() != -1


def saved_tensors_are_redirected() -> bool:
    """Whether saved-tensor hooks are active, as inside checkpoints: activations are then recomputed or offloaded."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def saved_tensors_are_moved() -> bool:
    """Whether the active saved-tensor hooks only move tensors (`memsave.offload`), which nothing recomputes then."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and getattr(hooks[0], "only_moves", False)


@contextmanager
def unobserved() -> Iterator[None]:
    """Context manager: dispatch modes and saved-tensor hooks of the caller do not see the operations inside.

    A checkpoint counts the tensors that are saved inside it, and a selective one also the operators.
    """

    def unchanged(tensor: Tensor) -> Tensor:
        return tensor

    with _disable_current_modes(), torch.autograd.graph.saved_tensors_hooks(unchanged, unchanged):
        yield


def leaves_of(tensor: Tensor, *, stop: type[torch.autograd.Function]) -> Iterator[Tensor | None]:
    """The leaves that the graph of a tensor reaches; None in place of a node of the function `stop`."""
    waiting: list[Any] = [tensor.grad_fn]
    found = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if isinstance(node, stop._backward_cls):
            yield None
            continue
        if hasattr(node, "variable"):
            yield node.variable
        for following, _ in node.next_functions:
            if following is not None and following not in found:
                found.add(following)
                waiting.append(following)


def leaves_past(tensors: Iterable[Tensor], hook: type[torch.autograd.Function]) -> Iterator[Tensor]:
    """The leaves that the graph of the tensors reaches; past a node of the function `hook`, through its first input."""
    waiting: list[Any] = [each.grad_fn for each in tensors if each.grad_fn is not None]
    found = set(waiting)
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            yield node.variable
        inputs = node.next_functions
        for following, _ in inputs[:1] if isinstance(node, hook._backward_cls) else inputs:
            if following is not None and following not in found:
                found.add(following)
                waiting.append(following)


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor belongs to FakeTensorMode: its values cannot be read."""
    return isinstance(tensor, FakeTensor)


version: Callable[[Tensor], int] = attrgetter("_version")
"""The tensor's in-place counter: detects that a tensor was written."""


def storage_id(tensor: Tensor) -> int:
    """The identity of a storage, also of fake tensors, which have no data pointer."""
    return tensor.untyped_storage()._cdata


def is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()` was called: its forward is then traced without later patches."""
    return module._compiled_call_impl is not None


def forward_pre_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The module's forward pre-hooks: the older utilities of `torch.nn.utils` compute weights in one."""
    return list(module._forward_pre_hooks.values())


def tensor_hooks(tensor: Tensor) -> Any:
    """The tensor's own gradient hooks, which may change its gradient."""
    return tensor._backward_hooks


def gradient_hooks(parameter: Tensor) -> list[Callable[..., Any]]:
    """The parameter's gradient hooks of both kinds: they would not run, because no gradient is formed."""
    both = (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None))
    return [hook for registered in both for hook in (registered or {}).values()]


own_parameters: Callable[[nn.Module], dict[str, Any]] = attrgetter("_parameters")
"""The registry of the module's own parameters, which may be written: setattr accepts no plain tensor."""

own_buffers: Callable[[nn.Module], dict[str, Tensor | None]] = attrgetter("_buffers")
"""The registry of the module's own buffers: `named_buffers` leaves out those that are None."""


def own_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The module's children by each of their names: `named_children` gives a child with two names once."""
    return ((name, child) for name, child in module._modules.items() if child is not None)


non_persistent_buffers: Callable[[nn.Module], set[str]] = attrgetter("_non_persistent_buffers_set")
"""The names of the module's buffers that `state_dict` leaves out: these are not released."""


def convolution_weight_grad(
    grad: Tensor, x: Tensor, weight: Tensor, *, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """The weight gradient of a convolution: `torch.nn.grad` computes it through a slower transposed convolution."""
    options = (stride, padding, dilation, False, [0] * (x.dim() - 2), groups, [False, True, False])
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *options)[1]


def is_reentrant_checkpoint_error(error: RuntimeError) -> bool:
    """Whether PyTorch refused a reentrant checkpoint under `torch.autograd.grad`: only the text tells."""
    return "use_reentrant=True" in str(error)


unfollowed: Callable[[], Any] = torch._C.DisableTorchFunction
"""Context manager: no TorchFunctionMode sees the operators inside."""


def is_view(tensor: Tensor) -> bool:
    """Whether a tensor is a view, which can't be detached in place."""
    return tensor._is_view()


def is_batched(tensor: Tensor) -> bool:
    """Whether a tensor belongs to `torch.func.vmap`, so that its shape lacks a dimension."""
    return torch._C._functorch.is_batchedtensor(tensor)


def without_overrides(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a Python function of PyTorch that hands no call to a TorchFunctionMode as a whole.

    The mode then sees the operators inside it; without this, they run outside of the mode.
    """
    checks = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    names = {**function.__globals__, **{name: lambda *_: False for name in checks}}
    code, defaults = function.__code__, function.__defaults__
    inside = FunctionType(code, names, function.__name__, defaults)
    inside.__kwdefaults__ = function.__kwdefaults__
    return inside


class FsdpParameter(NamedTuple):
    """A parameter that `fully_shard` manages."""

    shard: nn.Parameter
    """The DTensor, which has the `.grad` that an optimizer reads; registered in the module while that is sharded."""
    whole: nn.Parameter | None
    """The gathered copy, which forwards and backwards use; registered in the module while that is unsharded. It stays
    the same object, and its memory is freed and allocated again. None before the first time."""
    local: Tensor
    """The data of this process."""
    origin: int
    """The same number for all parameters that were one before they were sharded."""
    is_dtensor: bool
    """Whether it was a DTensor before, as under tensor parallelism."""


class FsdpGroup:
    """Parameters that `fully_shard` gathers and reduces together, with what its public API does not show."""

    def __init__(self, group: Any) -> None:
        self._group = group

    @property
    def module(self) -> Any:
        """The module, or the first of those, on which `fully_shard` was called."""
        return self._group.modules[0]

    def parameters(self) -> Iterator[FsdpParameter]:
        """The parameters of the group."""
        for each in self._group.fsdp_params:
            whole = getattr(each, "_unsharded_param", None)
            origin = getattr(each, "_orig_param_uid", id(each))  # before PyTorch 2.13 it does not exist
            yield FsdpParameter(each.sharded_param, whole, each._sharded_local_tensor, origin, each.is_dtensor)

    @property
    def is_unsharded(self) -> bool:
        """Whether the gathered copies have their memory now."""
        return self._group.is_unsharded

    @property
    def mesh_size(self) -> int:
        """The number of processes that hold shards; 0 if some hold copies, or if the mesh has several dimensions."""
        mesh = self._group.mesh_info.mesh
        is_plain = type(self._group.mesh_info).__name__ == "FSDPMeshInfo" and mesh.ndim == 1
        return mesh.size() if is_plain else 0

    @property
    def reshards_to_fewer(self) -> bool:
        """Whether a forward leaves the group sharded over a part of the processes."""
        return self._group._use_post_forward_mesh

    @property
    def dtypes(self) -> tuple[torch.dtype | None, torch.dtype | None]:
        """(of the gathered copies, of the reduction) in the group's policy; None: that of the parameter."""
        return self._group.mp_policy.param_dtype, self._group.mp_policy.reduce_dtype

    @property
    def reduces(self) -> bool:
        """Whether a backward reduces the gradients, unlike after `set_requires_gradient_sync(False)`."""
        return self._group.reduce_grads

    @property
    def reduction(self) -> tuple[float | None, bool]:
        """(the number by which sums of gradients are divided, None for that of processes; whether they are sums)."""
        return self._group.gradient_divide_factor, self._group.force_sum_reduction_for_comms

    @reduction.setter
    def reduction(self, value: tuple[float | None, bool]) -> None:
        self._group.gradient_divide_factor, self._group.force_sum_reduction_for_comms = value

    @property
    def reduces_unused(self) -> bool:
        """Whether a backward reduces zeros for a parameter without a gradient."""
        return getattr(self._group, "reduce_scatter_unused_params", False)  # before PyTorch 2.13 it does not exist

    @reduces_unused.setter
    def reduces_unused(self, value: bool) -> None:
        self._group.reduce_scatter_unused_params = value


def fsdp_groups(model: nn.Module) -> list[FsdpGroup]:
    """The groups of a model, in the order of its modules."""
    groups: dict[int, FsdpGroup] = {}
    if not (distributed.is_available() and distributed.is_initialized()):
        return []
    for module in model.modules():
        if is_fully_sharded(module):
            state: Any = module._get_fsdp_state()  # type: ignore[operator]
            found = getattr(state, "_fsdp_param_groups", None)  # before PyTorch 2.13 there is one group or None
            for group in filter(None, [state._fsdp_param_group] if found is None else found):
                groups.setdefault(id(group), FsdpGroup(group))
    return list(groups.values())
