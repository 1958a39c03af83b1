"""All private API of PyTorch that `memsave.profiler` uses, in one place; tests/profiler/test_torch_internals.py."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch._C._profiler import _EventType
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,  # no public name exists, though the docs recommend it
    _disable_current_modes,
)

__all__ = [
    "NEEDS_VALUES",
    "FakeTensorMode",
    "TorchDispatchMode",
    "allocations",
    "current_node_number",
    "fake_modes",
    "gathered_copies",
    "graph_task",
    "inner_tensors",
    "is_fake_mode_active",
    "is_wrapper",
    "next_node_number",
    "read_device",
    "reads_device",
    "register_first_accumulate_grad_hook",
    "unrecorded_waits",
    "watch_resizes",
]

NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
"""What FakeTensorMode raises for an operator whose result depends on values; they have no public base class."""
UNNUMBERED = 2**64 - 1  # the sequence number of nodes that accumulate gradients


def graph_task() -> int:
    """The number of the backward that runs in this thread, -1 outside of one; there is no public test for it."""
    return torch._C._current_graph_task_id()


def current_node_number() -> int | None:
    """The sequence number of the autograd node that runs in this backward; None if it has none.

    Nodes have no public link to the code that created them; sequence numbers count them in the order of creation.
    """
    node = torch._C._current_autograd_node()
    number = UNNUMBERED if node is None else node._sequence_nr()
    return None if number == UNNUMBERED else number


def next_node_number() -> int:
    """The sequence number that the next autograd node of this thread will get; see `current_node_number`."""
    return torch._C._autograd._get_sequence_nr()


def is_fake_mode_active() -> bool:
    """Whether a FakeTensorMode is entered; there is no public test for it."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def reads_device(func: Any) -> bool:
    """Whether this operator is `tensor.device` of a fake tensor, half of all calls that a mode sees on fake tensors."""
    return func is torch.ops.prim.device.default


def read_device(func: Any, args: tuple) -> Any:
    """The result of `reads_device(func)`: that of FakeTensorMode without its dispatch, which takes a long time."""
    mode = getattr(args[0], "fake_mode", None)
    return func(*args) if mode is None or mode.in_kernel_invocation else args[0].fake_device


def fake_modes(tensors: Iterable[torch.Tensor]) -> set[FakeTensorMode]:
    """The modes of those tensors that are fake; a mode is an attribute of its tensors only."""
    return {tensor.fake_mode for tensor in tensors if hasattr(tensor, "fake_mode")}


def is_wrapper(kind: type) -> bool:
    """Whether this tensor class wraps plain tensors; the protocol of wrapper subclasses has only private names."""
    return hasattr(kind, "__tensor_flatten__")


def inner_tensors(tensor: Any) -> list[torch.Tensor]:
    """The tensors inside a wrapper (see `is_wrapper`); a DTensor also names its mesh, which is no tensor."""
    parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return [each for each in parts if isinstance(each, torch.Tensor)]


def gathered_copies(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole copy) of each parameter that `fully_shard` manages and has gathered before.

    No public name exists for them. A copy stays the same tensor; its storage has no bytes while it is sharded.
    """
    for name, module in model.named_modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            state: Any = module._get_fsdp_state()
            found = getattr(state, "_fsdp_param_groups", None)  # before PyTorch 2.13 there is one group or None
            for group in filter(None, [state._fsdp_param_group] if found is None else found):
                for each in group.fsdp_params:
                    for tensor in each.all_gather_outputs:
                        yield f"{name}.{each._module_info.param_name}", tensor


def allocations(profile: torch.profiler.profile) -> Iterator[tuple[int, int, int]]:
    """Yield (time in ns, address, bytes; negative for a release) of each CPU allocation that the profiler recorded.

    The public `profile.events()` does not contain the addresses.
    """
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    for event in _with_children(profile.profiler.kineto_results.experimental_event_tree()):
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size


def _with_children(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _with_children(event.children)


def register_first_accumulate_grad_hook(
    parameter: nn.Parameter, hook: Callable[[torch.Tensor], None]
) -> Callable[[], None]:
    """Register a post-accumulate-grad hook that runs before those already registered; returns its remover.

    The public method only appends, and another hook may release the gradient.
    """
    hooks: dict[int, Any] = parameter._post_accumulate_grad_hooks or {}
    others = dict(hooks)
    hooks.clear()  # autograd runs the hooks in dict order and ignores `move_to_end`
    remove = parameter.register_post_accumulate_grad_hook(hook).remove
    hooks.update(others)
    return remove


def watch_resizes(function: Callable[[torch.UntypedStorage], None]) -> Callable[[], None]:
    """Call the function after Python code resizes a storage, as FSDP does; returns its remover.

    No operator runs for it, and no hook exists. The method is inherited from C++, so it is replaced on the class.
    """
    kind: Any = torch.UntypedStorage
    before = kind.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        result = before(storage, size)
        function(storage)
        return result

    def remove() -> None:
        if own is None:
            del kind.resize_
        else:
            kind.resize_ = own

    own = vars(kind).get("resize_")
    kind.resize_ = resize_
    return remove


def unrecorded_waits() -> Callable[[], None]:
    """Let no mode see what `Work.wait` runs; returns the function that undoes it.

    gloo reduces in tensors of its own, which it copies from there; they are the workspace of a collective.
    """
    if not torch.distributed.is_available():
        return lambda: None
    kind: Any = torch.distributed.Work
    before = kind.wait

    def wait(work: Any, *args: Any) -> Any:
        with _disable_current_modes():
            return before(work, *args)

    def remove() -> None:
        kind.wait = before

    kind.wait = wait
    return remove
