"""Record every byte that tensors occupy while a program runs, and report the category of each byte afterwards.

A `TorchDispatchMode` sees all operations below autograd, including those of backward and optimizer, so it sees every
tensor at its creation. During the run it only records births and deaths of storages in a ledger (see `ledger.py`), with
the phase and the running module (see `phases.py`). The category of a block is not known at its birth: the result of a
convolution may be released immediately or kept for backward, and a new tensor in backward may become the `.grad` of a
parameter. Categories are therefore assigned when the recorder exits:

| category | which blocks |
|---|---|
| parameter, buffer | those of the model |
| gathered | whole copies of parameters that FSDP shards |
| gradient | `.grad` of the model's parameters, seen at start and end, on accumulation, at optimizer steps |
| optimizer | tensors in the optimizer's state and options |
| input | existed before the first event (or came from outside), and was used |
| activation | created in a forward and alive when that forward phase ended: kept for backward |
| temporary | all others: created and released within one phase, gradients of activations, rebuilt activations |

The first matching line applies, so the categories are disjoint and add up to the total in every state.

**Not recorded:** memory inside an operator or a collective (the workspace of a convolution, buffers of gloo), which
`allocator_peak` measures, and allocations by other libraries. Sizes are those of storages, without the allocator's
rounding.

**Sharded models** (`fully_shard`): of parameters, gradients and optimizer state, this process's shards count. The whole
copies that FSDP gathers for a module, and frees by resizing their storages, are "gathered".

**Offloaded tensors** (`memsave.offload`) are in host memory, and do not count, also where the device is the CPU. The
report has their bytes as a separate number, `offloaded_bytes`.

**Fake tensors** have storages of the true size without memory. All statements above hold for them, in either order of
the two modes. Their sizes are those of the real run if PyTorch's fake kernels are accurate: on the CPU, for example,
`mse_loss` and `smooth_l1_loss` keep the unreduced loss alive behind their scalar, and their fake kernels do not.

**No side effects:** the recorder allocates no tensor, keeps none alive, and calls each operator once with its original
arguments, so values and lifetimes are those of the run without it. (In eval mode under `no_grad`, module hooks disable
the fused inference path of `nn.TransformerEncoder`.)
"""

import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from memsave.host_bytes import is_in_host_memory, listen, listen_to_copies
from memsave.profiler._torch_internals import (
    TorchDispatchMode,
    fake_modes,
    gathered_copies,
    graph_task,
    is_wrapper,
    read_device,
    reads_device,
    register_first_accumulate_grad_hook,
    unrecorded_waits,
    watch_resizes,
)
from memsave.profiler.ledger import Block, Ledger, storages_of, tensors_in
from memsave.profiler.phases import PhaseTracker
from memsave.profiler.report import MemoryReport, build_report


class MemoryRecorder(TorchDispatchMode):
    """Context manager that records live tensor bytes; `report()` returns the result after it exits.

    with MemoryRecorder(model, optimizer=optimizer) as recorder:
        step()
    print(recorder.report())

    Args:
        model: its modules, parameters, buffers and gradients are identified by name.
        optimizer: its state and steps are identified; without it, optimizer steps count as forward or backward.
        device: records only the storages of this device ("cuda": of every index); None records all.
        observe: called after each operator with (operator, args, kwargs, result, a function that returns the name of
            the running module), for example a `memsave.profiler.work.WorkCounter`. Its method `count_copy`, if it has
            one, is called with (direction, bytes, name of the running module) of each copy of `memsave.offload`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        device: torch.device | str | None = None,
        observe: Callable[..., None] | None = None,
    ) -> None:
        super().__init__()
        self._model = model
        self._optimizer = optimizer
        self._observe = observe
        self._tracker = PhaseTracker()
        self._ledger = Ledger(
            context=self._context,
            before_death=self._before_death,
            device=None if device is None else torch.device(device),
        )
        self._owners: dict[int, tuple[str, str]] = {}
        self._cleanup: ExitStack | None = None
        self._categories: list[str] | None = None
        self._offloaded = self._most_offloaded = 0

    def __enter__(self) -> "MemoryRecorder":
        """Record the existing tensors, register the hooks and start recording."""
        if self._cleanup is not None:
            raise RuntimeError(
                "this MemoryRecorder was entered twice and a recorder records once; make a new one for each recording"
            )
        for _, _, tensor in self._named_state():
            self._ledger.existed(tensor)
        self._claim_all()
        with ExitStack() as undo:
            undo.callback(self._finish)
            for name, module in self._model.named_modules():
                self._tracker.watch_module(module, name=name, undo=undo)
            if self._optimizer is not None:
                self._tracker.watch_optimizer(self._optimizer, on_step=self._claim_all, undo=undo)
            for name, parameter in self._model.named_parameters():
                if parameter.requires_grad and parameter.is_leaf:
                    undo.callback(self._watch_gradient(name, parameter))
            undo.callback(watch_resizes(self._ledger.resized))
            undo.callback(unrecorded_waits())
            for _, _, tensor in self._named_state():
                for storage, _ in storages_of(tensor):
                    if is_in_host_memory(storage):
                        self._record_offloaded(storage)
            undo.callback(listen(self._record_offloaded))
            count_copy = getattr(self._observe, "count_copy", None)
            if count_copy is not None:
                undo.callback(listen_to_copies(lambda *copy: count_copy(*copy, self._module())))
            for mode in fake_modes(self._model.parameters()):
                # For a fake model the tensors that the step creates from nothing must be fake, too.
                undo.enter_context(mode)
            super().__enter__()
            self._cleanup = undo.pop_all()
        return self

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        """Stop recording, remove all hooks and assign the categories; an exception is propagated."""
        super().__exit__(exc_type, exc_val, exc_tb)
        assert self._cleanup is not None
        self._cleanup.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run one operator and record its arguments and results in the ledger."""
        if any(map(is_wrapper, types)):
            return NotImplemented  # the wrapper calls operators on its inner tensors, which are dispatched here
        if reads_device(func):
            return read_device(func, args)
        # The argument of lift_fresh was created just before, without an operator; its result counts as the birth.
        if func is not torch.ops.aten.lift_fresh.default:
            for tensor in tensors_in(args):
                self._ledger.existed(tensor)
            if kwargs:
                for tensor in tensors_in(kwargs):
                    self._ledger.existed(tensor)
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self._ledger.produced(tensor)
        if self._observe is not None:
            self._observe(func, args, kwargs or {}, result, self._module)
        return result

    def report(self, *, allocator_peak_bytes: int | None = None) -> MemoryReport:
        """The report of the recording; RuntimeError before the recorder has exited.

        Args:
            allocator_peak_bytes: the result of `allocator_peak` for the same step, stored as a separate number.
        """
        if self._categories is None:
            raise RuntimeError(
                "report() was called before the recording ended, and categories are assigned at its end; "
                "leave the recorder's with-block first"
            )
        return build_report(
            self._ledger.blocks,
            events=self._ledger.events,
            categories=self._categories,
            phases=self._tracker.marks,
            offloaded_bytes=self._most_offloaded,
            allocator_peak_bytes=allocator_peak_bytes,
        )

    def _record_offloaded(self, storage: torch.UntypedStorage) -> None:
        """Count a storage in host memory until it dies."""
        self._offloaded += storage.nbytes()
        self._most_offloaded = max(self._most_offloaded, self._offloaded)
        weakref.finalize(storage, self._forget_offloaded, storage.nbytes()).atexit = False

    def _forget_offloaded(self, size: int) -> None:
        self._offloaded -= size

    def _context(self) -> tuple[str, str | None]:
        return self._tracker.mark(len(self._ledger.events)), self._tracker.module

    def _module(self) -> str | None:
        return self._tracker.module

    def _before_death(self) -> None:
        # A backward may release saved tensors before its first operator; these deaths belong to the backward, too.
        if graph_task() != -1:
            self._tracker.mark(len(self._ledger.events))

    def _watch_gradient(self, name: str, parameter: nn.Parameter) -> Callable[[], None]:
        def claim(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                self._claim("gradient", name, parameter.grad)

        setattr(claim, "observes_only", True)  # noqa: B010
        return register_first_accumulate_grad_hook(parameter, claim)  # a later hook may release the gradient

    def _named_state(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Yield (category, name, tensor) for all tensors of model and optimizer, in the order of precedence."""
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        for name, parameter in self._model.named_parameters():
            yield "parameter", name, parameter
        for name, buffer in self._model.named_buffers():
            yield "buffer", name, buffer
        for name, copy in gathered_copies(self._model):
            yield "gathered", name, copy
        for name, parameter in self._model.named_parameters():
            if parameter.grad is not None:
                yield "gradient", name, parameter.grad
        if self._optimizer is None:
            return
        for key, state in self._optimizer.state.items():
            for tensor in tensors_in(state):
                yield "optimizer", names.get(id(key), ""), tensor
        for group in self._optimizer.param_groups:
            for tensor in tensors_in([value for option, value in group.items() if option != "params"]):
                yield "optimizer", "", tensor

    def _claim(self, category: str, name: str, tensor: torch.Tensor) -> None:
        for block in self._ledger.find(tensor):
            self._owners.setdefault(block, (category, name.rpartition(".")[0]))

    def _claim_all(self) -> None:
        for category, name, tensor in self._named_state():
            self._claim(category, name, tensor)

    def _finish(self) -> None:
        self._claim_all()
        self._ledger.close()
        ends = self._tracker.forward_ends()
        self._categories = []
        for index, block in enumerate(self._ledger.blocks):
            category, block.module = self._owners.get(index, (_category(block, ends), block.module))
            self._categories.append(category)


def _category(block: Block, forward_ends: list[int]) -> str:
    """The category of a block that belongs to neither model nor optimizer."""
    if block.phase == "before":
        return "input"
    if block.phase == "forward":
        if block.death is None:
            return "activation"
        after = bisect_left(forward_ends, block.birth)
        if after < len(forward_ends) and block.death > forward_ends[after]:
            return "activation"
    return "temporary"
