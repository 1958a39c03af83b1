"""Per-example gradient clipping without per-example gradients (Li et al., ICLR 2022, arXiv 2110.05679).

    clipper = GhostClipper(model, max_grad_norm=0.1)
    losses = per_example_losses(model, batch)        # (B,)
    norms = clipper.backward(losses)                 # .grad += sum_b c_b grad(losses[b])

The mechanism is told in `tap.py`, the arithmetic in `gradients.py`, each kind of layer in `rules/`.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from memsave.ghost import refusals
from memsave.ghost.attach import attach_layers, find_refusals
from memsave.ghost.direct import add_formed_gradient
from memsave.ghost.gradients import InputTiles, has_values
from memsave.ghost.graph import refuse_differing, side_outputs, tapped_layers
from memsave.ghost.groups import Groups, clip_factors, layers_of
from memsave.ghost.layer import Layer, RelativeBias, in_backward, tensors_in
from memsave.ghost.refusals import Refusal, raise_refusals
from memsave.ghost.separation import Look, Separation
from memsave.ghost.tap import Call, Phase, hold, release, root
from memsave.ghost.unchanged import Snapshot

log = logging.getLogger("memsave.ghost")

CLIPPINGS = ("flat", "automatic", "per_layer")
PASSES = ("auto", 1, 2, "direct")
LEAST_BOUND = 1e-15


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
            single examples, whatever the layers: the one loss is taken as one example's, such as of all crops of a
            patient, whatever dimension 0 of the model's input is. "per_layer" takes one pass that keeps nothing.
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
        if not max_grad_norm >= LEAST_BOUND:
            raise ValueError(
                f"max_grad_norm is {max_grad_norm}; give a positive bound, such as 0.1 (and at least {LEAST_BOUND:g}, "
                f"for float32 does not hold smaller squares)"
            )
        if clipping not in CLIPPINGS or passes not in PASSES:
            raise ValueError(f"clipping={clipping!r}, passes={passes!r}; choose from {CLIPPINGS} and {PASSES}")
        self.model, self.max_grad_norm, self.clipping, self.passes = model, max_grad_norm, clipping, passes
        if clipping == "per_layer" and passes == 2:
            raise ValueError('clipping="per_layer" forms its sums in one pass; give passes="auto"')
        self.batch_size, self.memory_budget, self._copied = batch_size, memory_budget, False
        self.plan: dict[str, tuple[str, int]] = {}
        """By use of a parameter in the last backward: how its norm was found, and the bytes kept for its sum."""
        self.clipped: Tensor | None = None
        """(B,) of the last backward: whether any of the example's gradient was clipped."""
        self.chosen_passes: str | int | None = None if passes == "auto" else passes
        """What `passes` came to in the last backward; None before the first where it is "auto"."""
        self._nonfinite: int | Tensor = 0
        self._separation = Separation()
        self._snapshot: Snapshot | None = None
        self._call: Call | None = None
        self._groups: Groups | None = None
        self._running = False
        self._handles: list[Any] = []
        self._layers: list[Layer | RelativeBias] = []
        self._trainable: dict[str, nn.Parameter] = {}
        self._held: set[Tensor] = set()
        self._unfinished = False
        self.attach()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, each once."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def unfinished(self) -> bool:
        """Whether a backward failed while it added to `.grad`, which holds a part of its sum since then."""
        if self._unfinished:
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            self._unfinished = any(bool(grad.any()) for grad in grads)
        return self._unfinished

    @property
    def nonfinite(self) -> int:
        """Examples so far whose norm was not finite; they contributed zero."""
        return int(self._nonfinite)

    def backward(self, losses: Tensor) -> Tensor:
        """Add the clipped sum to `.grad`; returns the norms (B,) before clipping. `losses` (B,): the last forward's."""
        if losses.dim() != 1 or not (losses.requires_grad or not len(losses)):
            raise ValueError(
                f"losses have shape {tuple(losses.shape)}, requires_grad={losses.requires_grad}; give one loss per "
                f"example, shape (B,), with its graph"
            )
        if self.unfinished:
            raise ValueError(
                "the last backward failed while it added to .grad, so that a part of its examples would count twice; "
                "clear the gradients (optimizer.zero_grad()) and begin the logical batch again"
            )
        refusals.refuse_several_processes()
        self._drop_frozen()
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
        refusals.refuse_several_processes()
        self._separation.forget()
        problems = list(find_refusals(self.model))
        try:
            raise_refusals([*problems, *self._attach_layers()])
        except ValueError:
            self.close()
            raise
        self._handles.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(self._end, always_call=True))

    def close(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._detach_layers()
        self._handles, self._call, self._running = [], None, False

    def holds(self, parameter: Tensor) -> bool:
        """Whether it was a trainable parameter of the model when its layers were taken."""
        return parameter in self._held

    def _attach_layers(self) -> list[Refusal]:
        """Taps for all trainable parameters; returns what cannot have one."""
        self._trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._held = set(self._trainable.values())
        self._groups = layers_of(self.model) if self.clipping == "per_layer" else None
        refused: list[Refusal] = []
        if self.passes != "direct":
            self._layers, refused = attach_layers(self, self.model)
            hold(self, self._trainable.values())
        return refused

    def _detach_layers(self) -> None:
        for layer in self._layers:
            layer.detach()
        release(self)
        self._layers = []

    def _follow(self, model: nn.Module) -> None:
        """Take the layers anew where other parameters are trainable than before: adapters, layers that were frozen."""
        now = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if now.keys() == self._trainable.keys() and all(p is self._trainable[name] for name, p in now.items()):
            return
        self._drop_frozen()
        self._detach_layers()
        self._separation.forget()
        try:
            raise_refusals([*find_refusals(model), *self._attach_layers()])
        except ValueError:
            self._trainable = {}
            raise

    def _drop_frozen(self) -> None:
        """A parameter that was frozen since it got a sum must not move by it: no noise would be added."""
        for name, parameter in self._trainable.items():
            if not parameter.requires_grad and parameter.grad is not None:
                log.warning("%s was frozen since it got a clipped sum, which is dropped", name)
                parameter.grad = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "GhostClipper":
        """For a copy of the model, which has no clipper: it is closed."""
        copy = memo[id(self)] = object.__new__(GhostClipper)
        copy._copied = True
        return copy

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._copied or not torch.is_grad_enabled() or in_backward():
            return
        self._follow(model)
        modules = list(model.named_modules())
        raise_refusals([*refusals.statistics(modules), *refusals.parameter_hooks(self._trainable.items())])
        first = next(tensors_in([*args, *kwargs.values()]), None)
        if self.batch_size is None and self.passes != "direct" and (first is None or not first.dim()):
            raise ValueError(
                "the model got no tensor whose dimension 0 could be the batch; pass the inputs as tensors, or give the "
                "GhostClipper a batch_size"
            )
        size = len(first) if self.batch_size is None and first is not None and first.dim() else self.batch_size
        parameters = list(self._trainable.values())
        wide = torch.float64 if any(p.dtype in (torch.float64, torch.complex128) for p in parameters) else torch.float32
        holder = parameters[0] if parameters else first
        device = None if holder is None else holder.device
        probe = torch.zeros(size if size is not None else 1, dtype=wide, device=device, requires_grad=True)
        self._call, self._running = Call(batch_size=len(probe), probe=probe), True
        self._call.room, self._call.groups, self._call.factors = self.memory_budget, self._groups, self._factors
        self._separation.begin(module for _, module in modules)
        self._snapshot = Snapshot(modules)

    def _end(self, _: nn.Module, __: tuple[Any, ...], result: Any) -> None:
        if self._copied or in_backward() or not self._running:
            return
        self._running = False
        if self._call is not None and result is not None:
            found = [*self._call.refusals, *(self._snapshot.changes() if self._snapshot is not None else ())]
            self._snapshot = None
            if found:
                self._call = None
            raise_refusals(found)

    def call_of(self, name: str, *, after: bool = False) -> Call | None:
        """The record that a layer's use belongs to; None where nothing is to be recorded.

        `after`: the use may come after the model's forward, of its output.
        """
        call = self._call
        if not torch.is_grad_enabled():
            if call is not None and self._running and not in_backward():
                call.without_grad.add(name)
            return None
        if call is None or not (self._running or in_backward() or after):
            raise RuntimeError(
                f"{name} was called outside the model's own forward, so its batch is not known; call the model that "
                f"the GhostClipper was given"
            )
        if in_backward() and name in call.without_grad - call.layers:
            raise ValueError(
                f"{name} ran without grad in the forward and with it in the backward, so it would be differentiated "
                f"by a backward inside the backward (reentrant checkpoints and some reversible layers do that); freeze "
                f"it, or use memsave.reversible or checkpoints with use_reentrant=False"
            )
        return call

    def _ghost(self, losses: Tensor) -> Tensor:
        call = self._checked_call(losses)
        self._choose_passes(call)
        parameters = [p for p in self._trainable.values() if p.requires_grad]
        summing = done = False
        untouched = {} if self._groups is not None else self._trainable  # groups add their sums on the way
        try:
            with refusals.reentrant_checkpoints_refused(), refusals.gradients_left_alone(untouched):
                self._look(call, losses)
                call.phase, call.keep_all = Phase.NORM, self.chosen_passes == 1
                with call.one_backward(losses):
                    stand_ins = [each for use in call.traced for each in use.stand_ins.values()]
                    (squared, *found) = torch.autograd.grad(
                        losses,
                        [call.probe, *parameters, *stand_ins],
                        grad_outputs=torch.ones_like(losses),
                        retain_graph=self.chosen_passes == 2,
                        allow_unused=True,
                    )
            refusals.refuse_escaped(self.model, parameters, found[: len(parameters)])
            if call.traced and has_values(call.probe):
                refuse_differing(call.traced, found[len(parameters) :], squared=squared)
            if squared is None and parameters:
                raise ValueError("the losses depend on no trainable layer of the model's last forward; give its own")
            with torch.no_grad(), torch.autocast(call.probe.device.type, enabled=False):
                call.clip_the_rest()
                norms = root(torch.zeros_like(call.probe) if squared is None else squared)
                weights = self._factors(norms) if self._groups is None else call.lowest
                self._note(norms, weights)
                summing = True
                if self._groups is None and self.chosen_passes == 1:
                    call.add_sums(list(call.ledger), weights)
            if self.chosen_passes == 2:
                self._add_sums_again(call, losses, weights, parameters)
            done = True
        except refusals.GradientWritten:
            summing = True
            raise
        finally:
            self._unfinished |= not done and (summing or bool(call.summed))
            call.end()
            self._call, self._snapshot, self.plan = None, None, call.plan
        return norms

    def _add_sums_again(self, call: Call, losses: Tensor, weights: Tensor, parameters: list[nn.Parameter]) -> None:
        """The second backward, in which each layer weighs its examples."""
        kept = weights != 0
        call.kept = None if not has_values(kept) or bool(kept.all()) else kept
        call.phase, call.weights, call.tiles = Phase.SUM, weights, InputTiles()
        call.ledger.clear()
        used = [p for p in parameters if p in call.uses]
        with call.one_backward(losses):
            torch.autograd.backward(losses, grad_tensors=torch.ones_like(losses), inputs=used)
        call.refuse_unlike_passes()

    def _checked_call(self, losses: Tensor) -> Call:
        """The record of the last forward, if these are its losses and nothing speaks against clipping them."""
        call = self._call
        if call is None or (len(losses) != call.batch_size and self.passes != "direct"):
            seen = "no forward" if call is None else f"a batch of {call.batch_size}"
            raise ValueError(f"there are {len(losses)} losses, but the model saw {seen}; give one loss per example")
        frozen = refusals.frozen_since(self._trainable, call.uses)
        side = refusals.side_outputs(side_outputs(losses) if call.traced else ())
        raise_refusals([*call.refusals, *frozen, *side])
        return call

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

    def _look(self, call: Call, losses: Tensor) -> None:
        """Some losses alone must leave the other examples' rows at zero (see `separation.py`)."""
        if call.batch_size < 2 or not has_values(losses):
            return
        unseen = call.layers - self._separation.seen
        kind = self._separation.kind_of_look(bool(unseen) and bool(unseen & tapped_layers(losses)))
        if not kind:
            return
        call.phase = Phase.CHECK
        for kept in self._separation.sides(kind, len(losses), losses.device):
            call.look = Look(kept) if call.look is None else call.look
            call.look.kept = kept
            with call.one_backward(losses):
                torch.autograd.grad(
                    losses, call.probe, grad_outputs=kept.to(losses.dtype), retain_graph=True, allow_unused=True
                )
        assert call.look is not None
        self._separation.conclude(call.look)

    def _direct(self, losses: Tensor) -> Tensor:
        if len(losses) != 1:
            raise ValueError(f"passes='direct' is for one example, not {len(losses)}; set the micro-batch to 1")
        if self._call is None and any(True for _ in self.model.buffers()):
            raise ValueError("the model saw no forward, so changes of its buffers would not be seen; call the model")
        if self._call is None:  # parts of the model may be called by themselves
            hooks = refusals.parameter_hooks(self.model.named_parameters())
            raise_refusals([*refusals.statistics(self.model.named_modules()), *hooks])
        else:
            self._checked_call(losses)
        done = False
        try:
            squares, lowest = add_formed_gradient(losses, self.parameters, self._groups, self._factors)
            done = True
        finally:
            self._unfinished |= not done
            self._call, self._snapshot = None, None
        self._note(root(squares), lowest)
        return root(squares)

    def _factors(self, norms: Tensor) -> Tensor:
        """c for each example, of the norms of its gradient or of a group's."""
        bound = self.max_grad_norm if self._groups is None else self._groups.share(self.max_grad_norm)
        return clip_factors(norms, bound, clipping=self.clipping)

    def _note(self, norms: Tensor, factors: Tensor) -> None:
        self._nonfinite = self._nonfinite + (~norms.isfinite()).sum()
        self.clipped = factors < 1
