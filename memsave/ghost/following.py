"""Which forwards of a clipped model are followed operator by operator, and their recomputations in the backward.

The first forward is followed. If all parameters turn out to be used by layers with a rule that keep the examples in
dimension 0, in their order, later forwards are not followed, which saves time.
"""

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memsave.ghost._torch_internals import in_backward
from memsave.ghost.backward_context import BackwardContext
from memsave.ghost.operator_trace import OperatorTrace, forget
from memsave.ghost.row_follower import RowFollower


class Following:
    """The traces of a model's forwards."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._followers: dict[int, RowFollower] = {}
        self._handles: list[Any] = []
        self._thread = threading.local()
        self._trace: OperatorTrace | None = None
        self._inputs: list[Tensor] = []
        self._running = False
        self.needed: bool | None = None
        """Whether forwards must be followed; None before a forward has shown it."""

    def reset(self) -> None:
        """Follow the next forward, because the model has changed; ends a forward that did not."""
        self.end(iter(()))
        for handle in self._handles:
            handle.remove()
        self._handles, self.needed, self._trace = [], None, None

    def begin(self, context: BackwardContext, parameters: Mapping[str, nn.Parameter], inputs: Iterator[Tensor]) -> None:
        """Follow a forward, if that is needed or not known."""
        self.end(iter(()))
        self._trace = None
        if self.needed is False or not context.batch_size or torch.compiler.is_compiling():
            return
        self._trace = context.trace = OperatorTrace(context, parameters, self._followers)
        self._inputs = list(inputs)
        self._trace.mark_examples(iter(self._inputs))
        self._trace.__enter__()
        self._running = True

    def end(self, outputs: Iterator[Tensor]) -> None:
        """End a forward, if one is followed."""
        if self._trace is None or not self._running:
            return
        self._running = False
        self._trace.__exit__(None, None, None)
        forget(outputs)
        context = self._trace.context
        if self._trace.needed:
            self.needed = True
        elif context.batch_size > 1 and self.needed is None and context.layers:
            self.needed = False
        if self.needed and context.recomputes and not self._handles:
            for module in self._model.modules():
                self._handles.append(module.register_forward_pre_hook(self._enter))
                self._handles.append(module.register_forward_hook(self._exit, always_call=True))

    def finish(self) -> None:
        """Drop the trace, after the backwards of its forward."""
        forget(iter(self._inputs))
        self._inputs, self._trace = [], None

    def _enter(self, *_: Any) -> None:
        """Follow a recomputation in the backward, from its outermost module on."""
        depth = self._thread.depth = getattr(self._thread, "depth", 0) + 1
        if depth == 1 and self._trace is not None and in_backward():
            self._trace.__enter__()
            self._thread.entered = self._trace

    def _exit(self, *_: Any) -> None:
        self._thread.depth -= 1
        if self._thread.depth == 0 and getattr(self._thread, "entered", None) is not None:
            self._thread.entered.__exit__(None, None, None)
            self._thread.entered = None
