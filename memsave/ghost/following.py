"""Which forwards of a clipped model are followed operator by operator.

The first forward is followed. If all parameters belong to layers with a rule and turn out to be used by them alone,
with the examples in dimension 0, in their order, later forwards are not followed, which saves time. Recomputations of a
followed forward are followed, too, because `BackwardContext` runs its backwards inside the trace.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from memsave.ghost.backward_context import BackwardContext
from memsave.ghost.operator_trace import OperatorTrace, forget
from memsave.ghost.row_follower import RowFollower


class Following:
    """The traces of a model's forwards."""

    def __init__(self) -> None:
        self._followers: dict[int, RowFollower] = {}
        self._trace: OperatorTrace | None = None
        self._inputs: list[Tensor] = []
        self._running = False
        self.needed: bool | None = None
        """Whether forwards must be followed; None before a forward has shown it."""

    def reset(self) -> None:
        """Follow the next forward, because the model has changed; ends a forward that did not."""
        self.end(iter(()))
        self.needed, self._trace = None, None

    def begin(
        self,
        context: BackwardContext,
        parameters: Mapping[str, nn.Parameter],
        inputs: Iterator[Tensor],
        *,
        has_rules: bool,
    ) -> None:
        """Follow a forward, if that is needed or not known.

        `has_rules`: whether every parameter belongs to a layer with a rule; a forward may skip others by chance.
        """
        self.end(iter(()))
        self._trace = None
        is_known = self.needed is False and context.rows.standard
        if is_known or not context.batch_size or torch.compiler.is_compiling():
            return
        self.needed = self.needed or (None if has_rules else True)
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
        elif context.batch_size > 1 and self.needed is None and context.layers and not context.refusals:
            self.needed = False

    def finish(self) -> None:
        """Drop the trace, after the backwards of its forward."""
        forget(iter(self._inputs))
        self._inputs, self._trace = [], None
