"""Per-example gradient clipping without per-example gradients (Li et al., ICLR 2022, arXiv 2110.05679).

    clipper = GhostClipper(model, max_grad_norm=0.1)
    losses = per_example_losses(model, batch)        # (B,)
    norms = clipper.backward(losses)                 # .grad += sum_b c_b grad(losses[b])

The mechanism is told in `tap.py`, the arithmetic in `gradients.py`, each kind of layer in `rules/`.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memsave.ghost.gradients import Dense, InputTiles, has_values
from memsave.ghost.groups import Groups, clip_factors, layers_of
from memsave.ghost.layer import Layer, RelativeBias, in_backward
from memsave.ghost.refusals import (
    reentrant_checkpoints_refused,
    refuse_escaped,
    refuse_mixed,
    refuse_statistics,
    refuse_updated_buffers,
    refuse_wrapped,
)
from memsave.ghost.tap import Call, Phase, add_sum, hold, release, root

log = logging.getLogger("memsave.ghost")

FOLDING = ("OPTDecoderLayer",)  # their layers see (B T, d), the places of an example in a row
CLIPPINGS = ("flat", "automatic", "per_layer")
PASSES = ("auto", 1, 2, "direct")
LEAF_ELEMENTS = 2**20  # a module with parameters and children is one generic leaf up to this size, refused above


class GhostClipper:
    """Clips each example's gradient to `max_grad_norm`, exactly.

    Formal guarantee: `backward(losses)` adds sum_b c_b grad(losses[b]) to `.grad`, in which every summand's norm over
    all trainable parameters together is at most `max_grad_norm`, provided that losses[b] depends on example b alone.
    Whether the layers keep examples apart is looked at once, in the first backward of two or more of them. Rounding
    makes a norm never too small: a bound on its error is added (see `tap.Call`).

    Args:
        model: any module that keeps the examples in dimension 0 of its trainable layers' outputs.
        max_grad_norm: the bound C.
        clipping: "flat", c = min(1, C / norm), or "automatic", c = C / (norm + 0.01), of the whole gradient;
            "per_layer" clips each of K layers' to C / sqrt(K) and forms its sum on the way (see `groups.py`).
        passes: 1 keeps what the sum needs and forms it without a second backward; 2 runs the backward again, in which
            each layer weighs its examples, and keeps nothing, for models under checkpoints or reversible sequences;
            "auto" takes 2 where activations are not stored, else 1, and says so in `chosen_passes`; "direct" is for
            single examples, whatever the layers. "per_layer" takes one pass that keeps nothing.
        batch_size: the number of examples of every call; None reads it from dimension 0 of the model's first tensor
            argument, in mappings and sequences, too.
        memory_budget: bytes that may be kept beyond (A, G) of each layer to save time: the logits of
            `linear_cross_entropy`, and gradients formed where Gram matrices take longer. `plan` says what was.

    Raises ValueError, by name, for what cannot be clipped exactly.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_grad_norm: float,
        clipping: str = "flat",
        passes: str | int = "auto",
        batch_size: int | None = None,
        memory_budget: int = 0,
    ) -> None:
        if not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {max_grad_norm}; give a positive bound, such as 0.1")
        if clipping not in CLIPPINGS or passes not in PASSES:
            raise ValueError(f"clipping={clipping!r}, passes={passes!r}; choose from {CLIPPINGS} and {PASSES}")
        self.model, self.max_grad_norm, self.clipping, self.passes = model, max_grad_norm, clipping, passes
        if clipping == "per_layer" and passes == 2:
            raise ValueError('clipping="per_layer" forms its sums in one pass; give passes="auto"')
        self.batch_size, self.memory_budget = batch_size, memory_budget
        self.plan: dict[str, tuple[str, int]] = {}
        """By use of a parameter in the last backward: how its norm was found, and the bytes kept for its sum."""
        self.clipped: Tensor | None = None
        """(B,) of the last backward: whether any of the example's gradient was clipped."""
        self.chosen_passes: str | int | None = None if passes == "auto" else passes
        """What `passes` came to in the last backward; None before the first where it is "auto"."""
        self._nonfinite: int | Tensor = 0
        self._checked: set[str] = set()
        self._call: Call | None = None
        self._groups: Groups | None = None
        self._running = False
        self._handles: list[Any] = []
        self._layers: list[Layer | RelativeBias] = []
        refuse_wrapped(model)
        refuse_statistics(model)
        self.attach()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, each once."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def nonfinite(self) -> int:
        """Examples so far whose norm was not finite; they contributed zero."""
        return int(self._nonfinite)

    def backward(self, losses: Tensor) -> Tensor:
        """Add the clipped sum to `.grad`; returns the norms (B,) before clipping. `losses` (B,): the last forward's."""
        if losses.dim() != 1 or not losses.requires_grad:
            raise ValueError(
                f"losses have shape {tuple(losses.shape)}, requires_grad={losses.requires_grad}; give one loss per "
                f"example, shape (B,), with its graph"
            )
        if not len(losses):  # an empty Poisson batch: a step of noise alone
            norms, self._call, self.clipped = losses.detach(), None, losses.detach() < 0
        else:
            norms = self._direct(losses) if self.passes == "direct" else self._ghost(losses)
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return norms

    def attach(self) -> None:
        """Take the model's layers, as the constructor does; for a clipper that was closed."""
        try:
            self._attach()
        except ValueError:
            self.close()
            raise

    def close(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        for layer in self._layers:
            layer.detach()
        release(self)
        self._handles, self._layers, self._call = [], [], None

    def _attach(self) -> None:
        self._groups = layers_of(self.model) if self.clipping == "per_layer" else None
        if self.passes == "direct":
            return
        folding = [name for name, module in self.model.named_modules() if type(module).__qualname__ in FOLDING]
        for name, module in self.model.named_modules():
            if "forward" in vars(module):
                raise ValueError(
                    f"the forward of {name or 'the model'} is replaced already; close what replaced it first"
                )
            if any(module is inner for layer in self._layers for inner in layer.module.modules()):
                continue  # part of a leaf
            if RelativeBias.applies(module):
                self._layers.append(RelativeBias(self, module, name=name or "the model"))
                continue
            own = [key for key, p in module._parameters.items() if p is not None and p.requires_grad]
            if not own:
                continue
            whole = {key: p for key, p in module.named_parameters() if p.requires_grad}
            heavy = sum(p.numel() for p in whole.values()) > LEAF_ELEMENTS or isinstance(module, nn.MultiheadAttention)
            if len(whole) > len(own) and heavy:
                raise ValueError(
                    f"{name or 'the model'} ({type(module).__name__}) owns {own[0]} and has children with parameters: "
                    f"no rule is exact for it; freeze {own[0]}, or move it into a module of its own"
                )
            layer = Layer(self, module, name=name or "the model", names=tuple(whole))
            layer.folded = any(parent and name.startswith(f"{parent}.") for parent in folding)
            self._layers.append(layer)
        self._handles.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(self._end, always_call=True))
        hold(self, self.parameters)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled() or in_backward():
            return
        refuse_statistics(model)
        first = next(_tensors([*args, *kwargs.values()]), None)
        if self.batch_size is None and (first is None or not first.dim()):
            raise ValueError(
                "the model got no tensor whose dimension 0 could be the batch; pass the inputs as tensors, or give the "
                "GhostClipper a batch_size"
            )
        size = len(first) if self.batch_size is None and first is not None else self.batch_size
        parameters = self.parameters
        wide = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
        holder = parameters[0] if parameters else first
        device = None if holder is None else holder.device
        probe = torch.zeros(size or 0, dtype=wide, device=device, requires_grad=True)
        self._call, self._running = Call(batch_size=len(probe), probe=probe), True
        self._call.room, self._call.groups, self._call.factors = self.memory_budget, self._groups, self._factors
        self._call.buffers = [(name, buffer, buffer._version) for name, buffer in model.named_buffers()]

    def _end(self, *_: Any) -> None:
        if not in_backward():
            self._running = False

    def call_of(self, name: str, *, after: bool = False) -> Call | None:
        """The record that a layer's use belongs to; None where nothing is to be recorded.

        `after`: the use may come after the model's forward, of its output.
        """
        if not torch.is_grad_enabled():
            return None
        if self._call is None or not (self._running or in_backward() or after):
            raise RuntimeError(
                f"{name} was called outside the model's own forward, so its batch is not known; call the model that "
                f"the GhostClipper was given"
            )
        return self._call

    def _ghost(self, losses: Tensor) -> Tensor:
        call = self._call
        if call is None or len(losses) != call.batch_size:
            seen = "no forward" if call is None else f"a batch of {call.batch_size}"
            raise ValueError(f"there are {len(losses)} losses, but the model saw {seen}; give one loss per example")
        refuse_updated_buffers(self.model, call.buffers)
        self._choose_passes(call)
        parameters = self.parameters
        try:
            with reentrant_checkpoints_refused():
                self._check_examples_apart(call, losses)
                call.phase, call.keep_all = Phase.NORM, self.chosen_passes == 1
                (squared, *escaped) = torch.autograd.grad(
                    losses,
                    [call.probe, *parameters],
                    grad_outputs=torch.ones_like(losses),
                    retain_graph=self.chosen_passes == 2,
                    allow_unused=True,
                )
            refuse_escaped(self.model, parameters, escaped)
            with torch.no_grad(), torch.autocast(call.probe.device.type, enabled=False):
                call.clip_the_rest()
                norms = root(torch.zeros_like(call.probe) if squared is None else squared)
                weights = self._factors(norms) if self._groups is None else call.lowest
                self._note(norms, weights)
                if self._groups is None and self.chosen_passes == 1:
                    call.add_sums(list(call.ledger), weights)
            if self.chosen_passes == 2:
                kept = weights != 0
                call.kept = None if not has_values(kept) or bool(kept.all()) else kept
                call.phase, call.weights, call.tiles = Phase.SUM, weights, InputTiles()
                call.ledger.clear()
                used = [p for p in parameters if p in call.uses]
                torch.autograd.backward(losses, grad_tensors=torch.ones_like(losses), inputs=used)
        finally:
            call.phase, call.kept = Phase.IDLE, None
            call.ledger.clear()
            call.magnitudes.clear()
            call.tiles = InputTiles()
            self._call, self.plan = None, call.plan
        return norms

    def passes_of(self, call: Call) -> str | int:
        """What `passes` comes to for this forward."""
        return self._passes_and_why(call)[0] if self.passes == "auto" else self.passes

    def _passes_and_why(self, call: Call) -> tuple[int, str]:
        if self._groups is not None:
            return 1, "each layer's sum is formed on the way"
        if not call.rematerialised:
            return 1, "activations are stored"
        # of one example no more is kept than its gradient, in whose place the sum is formed where there is none yet
        held = sum(p.grad.numel() * p.grad.element_size() for p in self.parameters if p.grad is not None)
        if call.batch_size == 1 and held <= self.memory_budget:
            return 1, "one example's gradient takes no more than the sum"
        return 2, "activations are made again in the backward"

    def _choose_passes(self, call: Call) -> None:
        if self.passes == "auto":
            chosen, why = self._passes_and_why(call)
            if chosen != self.chosen_passes:
                log.info("passes='auto' takes %d: %s", chosen, why)
            self.chosen_passes = chosen

    def _check_examples_apart(self, call: Call, losses: Tensor) -> None:
        """Some losses alone must leave the other examples' rows at zero; looked at once for each layer.

        It finds layers and losses that mix examples, and layers whose dimension 0 is another one of the same length.
        """
        if call.batch_size < 2 or call.layers <= self._checked or not has_values(losses):
            return
        call.phase = Phase.CHECK
        number = torch.arange(len(losses), device=losses.device)
        for bit in range((len(losses) - 1).bit_length()):  # any two examples differ in one
            for side in (0, 1):
                call.kept = (number >> bit) % 2 == side
                chosen = call.kept.to(losses.dtype)
                torch.autograd.grad(losses, call.probe, grad_outputs=chosen, retain_graph=True, allow_unused=True)
        call.kept = None
        refuse_mixed(call.mixed)
        self._checked |= call.layers

    def _direct(self, losses: Tensor) -> Tensor:
        if len(losses) != 1:
            raise ValueError(f"passes='direct' is for one example, not {len(losses)}; set the micro-batch to 1")
        found = torch.autograd.grad(losses[0], self.parameters, allow_unused=True)
        gradients = {p: g for p, g in zip(self.parameters, found, strict=True) if g is not None}
        groups = self._groups or Groups.whole(gradients)
        squares, lowest = losses.detach() * 0, torch.ones_like(losses)
        for group in groups.members:
            members = [p for p in group if p in gradients]
            wides = (gradients[p].to(torch.promote_types(p.dtype, torch.float32)) for p in members)
            squared = sum((each.square().sum()[None] for each in wides), losses.detach() * 0)
            factors = self._factors(root(squared))
            squares, lowest = squares + squared, torch.minimum(lowest, factors)
            if not has_values(factors) or bool(factors.all()):  # finite
                for p in members:
                    add_sum(p, Dense(gradients[p][None]), factors)
        self._note(root(squares), lowest)
        return root(squares)

    def _factors(self, norms: Tensor) -> Tensor:
        """c for each example, of the norms of its gradient or of a group's."""
        bound = self.max_grad_norm if self._groups is None else self._groups.share(self.max_grad_norm)
        return clip_factors(norms, bound, clipping=self.clipping)

    def _note(self, norms: Tensor, factors: Tensor) -> None:
        self._nonfinite = self._nonfinite + (~norms.isfinite()).sum()
        self.clipped = factors < 1


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among values, in mappings and sequences, too, in their order."""
    for value in values.values() if isinstance(values, Mapping) else values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (Mapping, list, tuple)):
            yield from _tensors(value)
