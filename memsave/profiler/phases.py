"""The phase of the training step and the module that is running, at any moment of a recording.

The tracker keeps one stack. The pre-forward hook of a module pushes an entry and its forward hook pops it; the hooks of
the optimizer's step do the same. The hooks read and keep no argument, so they change neither values nor lifetimes. The
entry of a forward that raises is popped, too (`always_call`): non-reentrant checkpoints end their recomputation by an
exception.

Each entry stores the autograd graph task in which it was pushed (-1 outside of backward). This number distinguishes the
phases:

| top of the stack | current graph task | phase |
|---|---|---|
| a module, pushed in this task | none | forward |
| a module, pushed in this task | one | recompute: a forward that runs inside a backward |
| the optimizer, pushed in this task | any | optimizer (also a step inside a backward hook) |
| an entry of another task, or empty | one | backward; recompute if gradients are enabled (a checkpoint) |
| empty | none | forward if gradients are enabled, otherwise the previous phase continues |

By the last line, a loss computed outside every module belongs to the forward, and gradient clipping (which runs under
`no_grad` after a backward) belongs to the backward. Known error: a backward with `create_graph=True` runs with
gradients enabled, so its allocations are assigned to recompute.

A backward runs no module. Its allocations belong to the module whose forward created the running graph node: autograd
numbers nodes in the order of creation, and the tracker records the number at which each module began and ended. (Each
thread numbers its own nodes. On CUDA, a forward inside a backward runs in autograd's thread, and its numbers may be
assigned to the first modules of the main thread.)
"""

from bisect import bisect_right
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from memsave.profiler._torch_internals import current_node_number, graph_task, next_node_number

PHASES = ("forward", "recompute", "backward", "optimizer")


class _Entry(NamedTuple):
    name: str | None  # None for the optimizer's step
    owner: int  # id of the module or optimizer, which outlives its entry
    task: int


class PhaseTracker:
    """The stack of running forwards, and the phase derived from it."""

    def __init__(self) -> None:
        self._stack: list[_Entry] = []
        self.marks: list[tuple[int, str]] = []
        """(state, phase): events from this state on belong to the phase."""
        self._node_numbers: list[int] = []
        self._node_modules: list[str | None] = []
        """The module that created the graph nodes from each of these numbers on."""

    @property
    def module(self) -> str | None:
        """The name of the innermost running module; in a backward, of the module that created the running node."""
        task = graph_task()
        if self._stack and self._stack[-1].task == task:
            return self._stack[-1].name
        number = current_node_number() if task != -1 else None
        if number is None:
            return None
        index = bisect_right(self._node_numbers, number)
        return self._node_modules[index - 1] if index else None

    def _record_node_number(self) -> None:
        self._node_numbers.append(next_node_number())
        self._node_modules.append(self._stack[-1].name if self._stack else None)

    @property
    def phase(self) -> str:
        """The current phase, by the table in the module docstring."""
        task = graph_task()
        if self._stack and self._stack[-1].task == task:
            if self._stack[-1].name is None:
                return "optimizer"
            return "forward" if task == -1 else "recompute"
        if task != -1:
            return "recompute" if torch.is_grad_enabled() else "backward"
        if torch.is_grad_enabled() or not self.marks:
            return "forward"
        return self.marks[-1][1]

    def mark(self, state: int) -> str:
        """Record that the current phase holds from `state` on; return it."""
        phase = self.phase
        if not self.marks or self.marks[-1][1] != phase:
            self.marks.append((state, phase))
        return phase

    def forward_ends(self) -> list[int]:
        """The states at which a forward phase ends, in order."""
        return [state for (_, before), (state, after) in pairwise(self.marks) if before == "forward" != after]

    def watch_module(self, module: nn.Module, *, name: str, undo: ExitStack) -> None:
        """Register hooks on a module; they are removed when `undo` closes."""

        # These hooks run first and last, so that the allocations of other hooks belong to the module.
        def enter(module: nn.Module, args: tuple) -> None:
            self._push(name, module)

        def leave(module: nn.Module, args: tuple, result: object) -> None:
            self._pop(module)

        for hook in (enter, leave):  # code that replaces a forward may skip them
            setattr(hook, "observes_only", True)  # noqa: B010
        undo.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
        undo.callback(module.register_forward_hook(leave, always_call=True).remove)

    def watch_optimizer(
        self, optimizer: torch.optim.Optimizer, *, on_step: Callable[[], None], undo: ExitStack
    ) -> None:
        """Register hooks on an optimizer's step; removed when `undo` closes. `on_step` runs after each step."""

        def enter(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
            self._push(None, optimizer)

        def leave(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
            on_step()
            self._pop(optimizer)

        undo.callback(optimizer.register_step_pre_hook(enter).remove)
        undo.callback(optimizer.register_step_post_hook(leave).remove)

    def _push(self, name: str | None, owner: object) -> None:
        self._stack.append(_Entry(name, id(owner), graph_task()))
        self._record_node_number()

    def _pop(self, owner: object) -> None:
        # The entries above the owner's belong to forwards that ended by an exception without running their hooks.
        for depth in reversed(range(len(self._stack))):
            if self._stack[depth].owner == id(owner):
                del self._stack[depth:]
                self._record_node_number()
                return
