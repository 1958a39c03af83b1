"""Where the program stands: which module's forward is running, and in which phase of the training step.

The tracker keeps one stack of frames. A module's pre-forward hook pushes a frame and its forward hook pops it; the
optimizer's step hooks do the same. The hooks look at no argument and keep none, so they change neither values nor
lifetimes. A forward that raises is popped too (`always_call`), which matters since non-reentrant checkpoints leave
their recomputation by an exception.

Each frame remembers the autograd graph task in which it was entered (-1 outside of backward), and this number is what
tells the phases apart:

| innermost frame | graph task now | phase |
|---|---|---|
| a module, entered in this task | none | forward |
| a module, entered in this task | one | recompute: a forward that runs inside a backward |
| the optimizer, entered in this task | any | optimizer (a step inside a backward hook included) |
| entered in another task, or none | one | backward, or recompute when gradients are enabled (a checkpoint) |
| none | none | forward when gradients are enabled, else the phase before goes on |

The last line makes a loss computed outside every module part of the forward, and gradient clipping (which runs under
`no_grad` after a backward) part of the backward. One known mistake remains: a backward with `create_graph=True` runs
with gradients enabled, and what it makes is called recompute.

A backward runs no module. What it makes belongs to the module whose forward made the graph node that is running: nodes
are numbered in the order in which they are made, and the tracker notes the number at which each module began and ended.
(Every thread numbers its own nodes: of a forward that runs inside a backward on CUDA, in autograd's thread, the numbers
may be taken for those of the main thread's first modules.)
"""

from bisect import bisect_right
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

UNNUMBERED = 2**64 - 1  # of the nodes that accumulate gradients
PHASES = ("forward", "recompute", "backward", "optimizer")


class _Frame(NamedTuple):
    name: str | None  # None for the optimizer's step
    owner: int  # id of the module or optimizer, which outlives its own frame
    task: int


def graph_task() -> int:
    """The number of the backward that runs in this thread, -1 outside of one."""
    return torch._C._current_graph_task_id()


class PhaseTracker:
    """The stack of running forwards and the phase that follows from it."""

    def __init__(self) -> None:
        self._stack: list[_Frame] = []
        self.marks: list[tuple[int, str]] = []
        """(state, phase): from this state on events belong to the phase."""
        self._nodes: list[int] = []
        self._makers: list[str | None] = []
        """The module that made the graph nodes from each of these numbers on."""

    @property
    def module(self) -> str | None:
        """The innermost module that is running, or in a backward the one that made the running node, by its name."""
        task = graph_task()
        if self._stack and self._stack[-1].task == task:
            return self._stack[-1].name
        node = torch._C._current_autograd_node() if task != -1 else None
        return None if node is None else self._maker_of(node._sequence_nr())

    def _maker_of(self, number: int) -> str | None:
        if number == UNNUMBERED:
            return None
        place = bisect_right(self._nodes, number)
        return self._makers[place - 1] if place else None

    def _note_maker(self) -> None:
        self._nodes.append(torch._C._autograd._get_sequence_nr())
        self._makers.append(self._stack[-1].name if self._stack else None)

    @property
    def phase(self) -> str:
        """The current phase, by the table above."""
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
        """Note that the current phase holds from `state` on; return it."""
        phase = self.phase
        if not self.marks or self.marks[-1][1] != phase:
            self.marks.append((state, phase))
        return phase

    def forward_ends(self) -> list[int]:
        """The states at which a forward gave way to another phase, in order."""
        return [state for (_, before), (state, after) in pairwise(self.marks) if before == "forward" != after]

    def watch_module(self, module: nn.Module, *, name: str, undo: ExitStack) -> None:
        """Hook a module until `undo` closes."""

        # Ours run first and last, so that what other hooks allocate counts as the module's own.
        def enter(module: nn.Module, args: tuple) -> None:
            self._push(name, module)

        def leave(module: nn.Module, args: tuple, result: object) -> None:
            self._pop(module)

        for hook in (enter, leave):  # whoever takes a forward apart need not run them
            setattr(hook, "observes_only", True)  # noqa: B010
        undo.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
        undo.callback(module.register_forward_hook(leave, always_call=True).remove)

    def watch_optimizer(
        self, optimizer: torch.optim.Optimizer, *, on_step: Callable[[], None], undo: ExitStack
    ) -> None:
        """Hook an optimizer's step until `undo` closes; `on_step` runs after each step."""

        def enter(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
            self._push(None, optimizer)

        def leave(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
            on_step()
            self._pop(optimizer)

        undo.callback(optimizer.register_step_pre_hook(enter).remove)
        undo.callback(optimizer.register_step_post_hook(leave).remove)

    def _push(self, name: str | None, owner: object) -> None:
        self._stack.append(_Frame(name, id(owner), graph_task()))
        self._note_maker()

    def _pop(self, owner: object) -> None:
        # Everything above the owner's frame was left by an exception that ran no hook.
        for depth in reversed(range(len(self._stack))):
            if self._stack[depth].owner == id(owner):
                del self._stack[depth:]
                self._note_maker()
                return
