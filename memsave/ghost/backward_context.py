"""One forward of the model, and the backwards of its losses in their phases.

The clipper makes a `BackwardContext` at the start of each forward. The layers record their uses in it. The clipper then
calls one method for each phase:

    check_independence      losses of some examples alone are differentiated
    measure_norms           gives the squared norms (B,), as the gradient of the probe
    add_clipped_sums        forms the clipped sums, from kept gradients or in a second backward

Each method sets `phase`, and the norm hooks, which hold the context, act by it. State belongs to the context of one
forward, never to a module.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, nn

from memsave.ghost import _torch_internals as internals
from memsave.ghost.gradients import Gradient, has_values
from memsave.ghost.groups import Groups
from memsave.ghost.independence import IndependenceCheck
from memsave.ghost.late_checks import LateChecks
from memsave.ghost.ledger import Ledger
from memsave.ghost.refusals import Refusal, raise_refusals
from memsave.ghost.rows import STANDARD, Rows, RowSplit

# under a trace, PyTorch's own functions would run the whole backward, with all recomputations, outside of it
GRAD_INSIDE_A_TRACE = internals.without_overrides(torch.autograd.grad)
BACKWARD_INSIDE_A_TRACE = internals.without_overrides(torch.autograd.backward)


class Phase(Enum):
    """What the norm hooks do in the current backward."""

    NO_BACKWARD = auto()
    """The clipper runs no backward: an ordinary one is refused."""
    CHECK_INDEPENDENCE = auto()
    """Record which examples' rows get a gradient; form no gradients of parameters."""
    MEASURE_NORMS = auto()
    """Return the squared norms as the gradient of the probe."""
    ADD_SUMS = auto()
    """Add the clipped sums to `.grad`, in a second backward."""


class BackwardContext:
    """One forward of a batch, and the backwards of its losses.

    Args:
        probe: (B,), requires grad; its gradient collects the squared norms (see `norm_hook.py`).
        rows: which row of the model's inputs belongs to which example.
        memory_budget: bytes that may be kept to save time.
        groups: groups to clip one by one; None to clip whole gradients.
        clip_factors_of: clip factors (B,) from the norms (B,) of a group.
    """

    def __init__(
        self,
        probe: Tensor,
        *,
        rows: Rows = STANDARD,
        memory_budget: int = 0,
        groups: Groups | None = None,
        clip_factors_of: Callable[[Tensor], Tensor] = torch.ones_like,
    ) -> None:
        self.probe, self.batch_size = probe, len(probe)
        self.rows = rows
        self.row_count = len(probe) if rows.examples is None else len(rows.examples)
        self.phase = Phase.NO_BACKWARD
        self.ledger = Ledger(probe, bytes_left=memory_budget, groups=groups, clip_factors_of=clip_factors_of)
        self.layers: set[str] = set()
        """The names of the layers that ran with gradients."""
        self.used_by: dict[nn.Parameter, set[str]] = {}
        """The classes of layers with a rule, and the names of operators, that used each parameter."""
        self.refusals: list[Refusal] = []
        """What the forward found that cannot be clipped."""
        self.observer: Callable[..., None] | None = None
        """Called with the arguments of each norm hook: output, spec, saved tensors, parameters."""
        self.trace: Any = None
        """The OperatorTrace that follows the forward, or None."""
        self.late = LateChecks()
        """What the forward did not read, because it would have waited for the device."""
        self.before_backward: Callable[[], None] = lambda: None
        """Called before each backward."""
        self.recomputes = False
        """Whether some activations are recomputed in the backward."""
        self.offloads = False
        """Whether some activations are in host memory until the backward."""
        self._layers_without_grad: set[str] = set()
        self._backward: int | None = None  # the number of the backward that the clipper runs
        self._check = IndependenceCheck()
        self._repeats: dict[str, Tensor] = {}  # by layer, whether both passes had the same activations and gradients
        self._factors: Tensor = probe  # in ADD_SUMS: the clip factors (B,)
        self._kept: Tensor | None = None  # in ADD_SUMS: the examples (B,) with a factor above zero; None for all

    def has_rows(self, tensor: Tensor) -> bool:
        """Whether the tensor has one entry per row of the model's inputs in dimension 0."""
        return tensor.dim() > 0 and tensor.shape[0] == self.row_count

    @property
    def example_of_row(self) -> list[int]:
        """The example of each row of the model's inputs."""
        examples = self.rows.examples
        if examples is None:
            return list(range(self.batch_size))
        return examples.tolist() if isinstance(examples, Tensor) else list(examples)  # fake tensors have no values

    # The forward: layers record what they do.

    def record_use(self, layer: str, parameters: Iterable[nn.Parameter], *, by: str) -> None:
        """Count a use of each parameter by a layer's rule or an operator, unless it is a recomputation."""
        if internals.in_backward():
            return
        self.layers.add(layer)
        for parameter in parameters:
            self.ledger.count_use(parameter)
            self.used_by.setdefault(parameter, set()).add(by)
        moved = internals.saved_tensors_are_moved()
        self.offloads |= moved
        self.recomputes |= internals.saved_tensors_are_redirected() and not moved

    def record_run_without_grad(self, layer: str) -> None:
        """Record that a trainable layer ran without gradients."""
        self._layers_without_grad.add(layer)

    def ran_only_without_grad(self, layer: str) -> bool:
        """Whether the layer ran in the forward, but never with gradients."""
        return layer in self._layers_without_grad and layer not in self.layers

    def refuse(self, refusal: Refusal) -> None:
        """Record what cannot be clipped; the clipper raises it after the forward. A recomputation raises it at once."""
        if internals.in_backward():
            raise_refusals([refusal])
        self.refusals.append(refusal)

    # The backwards: the clipper calls one method for each phase.

    def check_independence(self, losses: Tensor, subsets: Iterable[Tensor]) -> IndependenceCheck:
        """Differentiate the losses of each subset (B,) of the examples alone; returns what the hooks recorded."""
        self.phase = Phase.CHECK_INDEPENDENCE
        for subset in subsets:
            self._check.subset = subset
            weights = subset.to(losses.dtype)
            with self._backward_of(losses):
                grad = GRAD_INSIDE_A_TRACE if self._follows_backward else torch.autograd.grad
                grad(losses, self.probe, grad_outputs=weights, retain_graph=True, allow_unused=True)
        return self._check

    def measure_norms(
        self, losses: Tensor, parameters: list[nn.Parameter], *, keep_gradients: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Squared norms (B,), and the gradients of the parameters that autograd itself formed, past any norm hook.

        The squared norms are None if no layer has a gradient. `keep_gradients`: keep what the clipped sums are formed
        from; otherwise the graph is kept, and a second backward forms the sums.
        """
        self.phase, self.ledger.keep_all = Phase.MEASURE_NORMS, keep_gradients
        with self._backward_of(losses):
            grad = GRAD_INSIDE_A_TRACE if self._follows_backward else torch.autograd.grad
            gradients: tuple[Tensor | None, ...] = grad(
                losses,
                [self.probe, *parameters],
                grad_outputs=torch.ones_like(losses),
                retain_graph=not keep_gradients,
                allow_unused=True,
            )
        squared, *found = gradients
        return squared, found

    def examples_kept(self, factors: Tensor) -> Tensor | None:
        """The examples (B,) with a factor above zero; None if those are all. Raises what late checks have found."""
        kept = factors != 0
        return None if self.late.all_true(kept) else kept

    def add_clipped_sums(self, factors: Tensor, kept: Tensor | None) -> None:
        """Add sum_b factors[b] g_b to `.grad`, from the gradients that `measure_norms` kept.

        `kept`: see `examples_kept`.
        """
        self.ledger.add_clipped_sums(list(self.ledger.entries), factors, kept)

    def add_clipped_sums_in_second_backward(
        self, losses: Tensor, parameters: list[nn.Parameter], factors: Tensor, kept: Tensor | None
    ) -> None:
        """Add sum_b factors[b] g_b to `.grad` in a second backward of the same losses.

        The losses are not weighted, because weighted losses would be rounded again in low precision. Raises ValueError
        if a layer had other activations in this backward, because the sums could then exceed the bound.
        """
        self.phase, self._factors, self._kept = Phase.ADD_SUMS, factors, kept
        self.ledger.free()
        used = [p for p in parameters if p in self.ledger.uses]
        with self._backward_of(losses):
            backward = BACKWARD_INSIDE_A_TRACE if self._follows_backward else torch.autograd.backward
            backward(losses, grad_tensors=torch.ones_like(losses), inputs=used)
        different = self._not_repeated()
        if different:
            raise ValueError(
                f"{different[0]} got other activations in the second pass than those whose norms were measured "
                f"(dropout with preserve_rng_state=False, or a separate random generator); keep the random state in "
                f"checkpoints, or set passes=1"
            )

    def _not_repeated(self) -> list[str]:
        """The layers whose two passes differ, by one read."""
        names, flags = list(self._repeats), list(self._repeats.values())
        if not flags or not has_values(flags[0]):
            return []
        passed = torch.stack([each.to(self.probe.device) for each in flags]).tolist()
        return [name for name, same in zip(names, passed, strict=True) if not same]

    def finish(self) -> None:
        """Free what the backwards kept; no other backward may follow."""
        self.phase, self._kept, self._check = Phase.NO_BACKWARD, None, IndependenceCheck()
        self.ledger.free()

    @property
    def _follows_backward(self) -> bool:
        """Whether recomputations in the backward must be followed, as the forward was."""
        return self.trace is not None and self.recomputes

    @contextmanager
    def _backward_of(self, losses: Tensor) -> Iterator[None]:
        """Inside, one backward of the losses runs; its number lets the hooks recognise an inner backward."""
        self.before_backward()
        self._backward = None

        def record(_: Tensor) -> None:
            self._backward = internals.current_backward()

        handle = losses.register_hook(record)
        following = self.trace if self._follows_backward else nullcontext()
        try:
            with following:
                yield
        finally:
            handle.remove()

    # The norm hooks call these in a backward.

    def refuse_other_backward(self, layer: str) -> None:
        """Raise unless the running backward is the clipper's own: any other would lose the layer's norms."""
        if self.phase is Phase.NO_BACKWARD:
            raise RuntimeError(
                "an ordinary backward ran through a model with a GhostClipper attached; call clipper.backward(losses), "
                "or clipper.close() first"
            )
        if self._backward is not None and self._backward != internals.current_backward():
            raise ValueError(
                f"{layer} was differentiated by a backward inside the backward, whose norms would be lost (reentrant "
                f"checkpoints and some reversible layers do that); freeze it, or use memsave.reversible or checkpoints "
                f"with use_reentrant=False"
            )

    @property
    def runs_two_passes(self) -> bool:
        """Whether the clipped sums are formed in a second backward."""
        return not self.ledger.keep_all

    def record_output_grad(self, layer: str, grad: Tensor, split: RowSplit) -> None:
        """CHECK_INDEPENDENCE: record which rows of a layer's output gradient are not zero."""
        self._check.record(layer, grad, split)

    def squared_norms(self, parameter: nn.Parameter, gradient: Gradient, name: str) -> Tensor:
        """MEASURE_NORMS: what a use of a parameter adds to the squared norms, (B,)."""
        return self.ledger.add(parameter, gradient, name)

    def add_clipped_sum(self, parameter: nn.Parameter, gradient: Gradient) -> None:
        """ADD_SUMS: add a use's clipped sum to `.grad`, without passing it through autograd, which would copy it."""
        self.ledger.add_clipped_sum(parameter, gradient, self._factors, self._kept)

    def record_repeat(self, layer: str, same: Tensor) -> None:
        """ADD_SUMS: record whether a layer had the same activations and gradients as when its norms were measured."""
        self._repeats[layer] = self._repeats.get(layer, same) & same
