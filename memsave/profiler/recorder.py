"""Records every byte that tensors occupy while a program runs, and says afterwards what each byte was for.

A `TorchDispatchMode` sees the operations below autograd, those of the backward and of the optimizer included, so every
tensor passes through it when it is made. Its only work during the run is to write births and deaths of storages into a
ledger (see `ledger`) beside the phase and the running module (see `phases`). What a block is *for* can't be known at
its birth: a convolution's result may be dropped at once or kept for the backward, and a fresh tensor in the backward
may become a parameter's `.grad`. Categories are therefore bound late, when the recorder exits:

| category | which blocks |
|---|---|
| parameter, buffer | the model's own |
| gradient | `.grad` of the model's parameters, seen at start and end, on accumulation, at optimizer steps |
| optimizer | tensors in the optimizer's state and options |
| input | existed before the first event (or came from outside), and was used |
| activation | made in a forward and still alive when that forward gave way to another phase: kept for the backward |
| temporary | everything else: made and released within one phase, gradients of activations, rebuilt activations |

The first line that fits wins, so the categories are disjoint and add up to the total at every moment.

What is not seen: memory inside one operator (a convolution's workspace), which `allocator_peak` measures; a storage
resized without an operator (`UntypedStorage.resize_`) until an operator next uses it; allocations by other libraries.
Sizes are those of storages, without an allocator's rounding. Fake tensors have storages of the true size and no
memory, and every statement above holds for them, whichever of the two modes is entered first. Their sizes are those of
the real run as far as PyTorch's own fake kernels tell the truth: `mse_loss` and `smooth_l1_loss` on the CPU, for
example, keep the unreduced loss alive behind their scalar, and their fake twins do not. The recorder allocates
no tensor, keeps none alive, and calls each operator once with the arguments it came with; numbers and lifetimes are
those of the run without it. (In eval mode under `no_grad`, module hooks keep `nn.TransformerEncoder` from its fused
inference path.)
"""

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from memsave.profiler.ledger import Block, Ledger, tensors_in
from memsave.profiler.phases import PhaseTracker, graph_task
from memsave.profiler.report import MemoryReport, build_report


class MemoryRecorder(TorchDispatchMode):
    """Context manager that records live tensor bytes; afterwards `report()` answers.

    with MemoryRecorder(model, optimizer=optimizer) as recorder:
        step()
    print(recorder.report())

    Args:
        model: names the modules, parameters, buffers and gradients.
        optimizer: names its state and the optimizer phase; its steps count as forward or backward when it is None.
        device: counts the storages of this device alone ("cuda" takes in every index); None counts all.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self._model = model
        self._optimizer = optimizer
        self._tracker = PhaseTracker()
        self._ledger = Ledger(
            context=self._context,
            before_death=self._before_death,
            device=None if device is None else torch.device(device),
        )
        self._owners: dict[int, tuple[str, str]] = {}
        self._cleanup: ExitStack | None = None
        self._categories: list[str] | None = None

    def __enter__(self) -> "MemoryRecorder":
        """Count what exists, hook model and optimizer, and start to listen."""
        if self._cleanup is not None:
            raise RuntimeError(
                "this MemoryRecorder was entered twice and a recorder records once: make a new one for each recording"
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
            for mode in {p.fake_mode for p in self._model.parameters() if hasattr(p, "fake_mode")}:
                # A model of fake tensors brings its mode along, so that what the step makes from nothing is fake, too.
                undo.enter_context(mode)
            super().__enter__()
            self._cleanup = undo.pop_all()
        return self

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        """Stop listening, remove every hook and bind the categories; an exception passes through."""
        super().__exit__(exc_type, exc_val, exc_tb)
        assert self._cleanup is not None
        self._cleanup.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run one operator and write its arguments and results into the ledger."""
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # the wrapper subclass unfolds into plain tensors, and those come back here
        # The argument of lift_fresh is a tensor that was made this moment without an operator: its result is the birth.
        if func is not torch.ops.aten.lift_fresh.default:
            for tensor in tensors_in(args):
                self._ledger.existed(tensor)
            if kwargs:
                for tensor in tensors_in(kwargs):
                    self._ledger.existed(tensor)
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self._ledger.produced(tensor)
        return result

    def report(self, *, allocator_peak_bytes: int | None = None) -> MemoryReport:
        """The answer, once the recorder has exited.

        Args:
            allocator_peak_bytes: what `allocator_peak` measured for the same step, to be shown in its own column.
        """
        if self._categories is None:
            raise RuntimeError(
                "report() was called before the recording ended, and categories are bound at its end: "
                "leave the recorder's with-block first"
            )
        return build_report(
            self._ledger.blocks,
            events=self._ledger.events,
            categories=self._categories,
            phases=self._tracker.marks,
            allocator_peak_bytes=allocator_peak_bytes,
        )

    def _context(self) -> tuple[str, str | None]:
        return self._tracker.mark(len(self._ledger.events)), self._tracker.module

    def _before_death(self) -> None:
        # A backward may release saved tensors before its first operator, and those deaths are already the backward's.
        if graph_task() != -1:
            self._tracker.mark(len(self._ledger.events))

    def _watch_gradient(self, name: str, parameter: nn.Parameter) -> Any:
        def note(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                self._claim("gradient", name, parameter.grad)

        setattr(note, "observes_only", True)  # noqa: B010
        # Ours goes first, for another hook may use the gradient up and drop it. Autograd ignores `move_to_end`.
        hooks: dict[int, Any] = parameter._post_accumulate_grad_hooks or {}
        others = dict(hooks)
        hooks.clear()
        remove = parameter.register_post_accumulate_grad_hook(note).remove
        hooks.update(others)
        return remove

    def _named_state(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Yield (category, name, tensor) of all that model and optimizer hold now, in the order of precedence."""
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        for name, parameter in self._model.named_parameters():
            yield "parameter", name, parameter
        for name, buffer in self._model.named_buffers():
            yield "buffer", name, buffer
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
    """The category of a block that nobody owns."""
    if block.phase == "before":
        return "input"
    if block.phase == "forward":
        if block.death is None:
            return "activation"
        after = bisect_left(forward_ends, block.birth)
        if after < len(forward_ends) and block.death > forward_ends[after]:
            return "activation"
    return "temporary"
