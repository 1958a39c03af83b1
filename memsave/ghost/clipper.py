"""Per-example gradient clipping without per-example gradients (Li et al., ICLR 2022, arXiv 2110.05679).

    clipper = GhostClipper(model, max_grad_norm=0.1)
    losses = per_example_losses(model, batch)        # (B,)
    norms = clipper.backward(losses)                 # .grad += sum_b c_b grad(losses[b])

How one example's loss becomes a clipped gradient, in `GhostClipper._clip`:

1. norms: a backward through the norm hooks of all layers gives |grad(losses[b])| as a gradient (`norm_hook.py`);
2. clip factors: c_b = min(1, C / norm_b) (`groups.clip_factors`);
3. clipped sums: sum_b c_b grad(losses[b]) is added to `.grad` (`ledger.py`).

The arithmetic is in `gradients.py`, and the rule for each kind of layer in `rules/`.
"""

import logging
from contextlib import nullcontext
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from memsave.ghost import refusals
from memsave.ghost._torch_internals import in_backward
from memsave.ghost.attach import Attachment
from memsave.ghost.backward_context import BackwardContext
from memsave.ghost.direct import add_clipped_gradient
from memsave.ghost.example_rows import ExampleRows, current_example_rows
from memsave.ghost.following import Following
from memsave.ghost.gradients import has_values, safe_sqrt, without_autocast
from memsave.ghost.groups import clip_factors, only_counted
from memsave.ghost.independence import IndependenceSchedule, layers_reached, raised_together, same_number
from memsave.ghost.layer_patch import tensors_in
from memsave.ghost.refusals import raise_refusals
from memsave.ghost.rows import STANDARD
from memsave.ghost.sharding import EMPTY_SHARE, INCOMPLETE_GROUPS
from memsave.ghost.snapshot import StateSnapshot
from memsave.processes import is_sharded, local_part, process_count, sum_gradients

log = logging.getLogger("memsave.ghost")

CLIPPINGS = ("flat", "automatic", "per_layer")
PASSES = ("auto", 1, 2, "direct")
MIN_BOUND = 1e-15


class GhostClipper:
    """Clips each example's gradient to `max_grad_norm`, exactly.

    Formal guarantee: `backward(losses)` adds sum_b c_b grad(losses[b]) to `.grad`. The norm of every summand, over all
    trainable parameters together, is at most `max_grad_norm`, provided that losses[b] depends on example b alone.
    The first backward of two or more examples checks that the layers do not mix examples. Rounding never makes a norm
    too small: a bound on its error is added (see `ledger.py`).

    Args:
        model: any module that keeps the examples in dimension 0 of its trainable layers' outputs.
        max_grad_norm: the bound C.
        clipping: "flat", c = min(1, C / norm), or "automatic", c = C / (norm + 0.01), of the whole gradient;
            "per_layer" clips the gradient of each of K layers to C / sqrt(K) during the backward (see `groups.py`).
        passes: 1 keeps what the sums are formed from, and runs one backward; 2 keeps nothing and runs a second backward
            in which each layer adds its sum, for models under checkpoints or reversible sequences; "auto" takes 2 if
            activations are recomputed, else 1, and stores the choice in `chosen_passes`; "direct" is for single
            examples and any layers: the only loss is taken as the loss of one example (such as of all crops of a
            patient), whatever dimension 0 of the model's input is. "per_layer" takes one pass and keeps nothing.
        batch_size: the number of examples of every call; None reads it from dimension 0 of the model's first tensor
            argument, which may be inside a mapping or sequence.
        memory_budget: bytes that may be kept beyond (g, a) of each layer to save time: the logits of
            `linear_cross_entropy`, and formed gradients where Gram matrices take longer. `plan` says what was kept.

    In several processes, each clips its own examples, which needs no communication; `sum_gradients` then adds the
    clipped sums up, once per logical batch. An optimizer step before that is refused.

    A model sharded by `torch.distributed.fsdp.fully_shard` needs two passes or "per_layer". Each backward then adds the
    sum over all processes to the shards' `.grad`. All processes must run the same forwards and backwards; one without
    examples takes any, and counts none (see `backward`, and `sharding.py`).

    Raises ValueError, with the name, for what cannot be clipped exactly.
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
        if not max_grad_norm >= MIN_BOUND:
            raise ValueError(
                f"max_grad_norm is {max_grad_norm}; give a positive bound, such as 0.1 (and at least {MIN_BOUND:g}, "
                f"because float32 cannot represent smaller squares)"
            )
        if clipping not in CLIPPINGS or passes not in PASSES:
            raise ValueError(f"clipping={clipping!r}, passes={passes!r}; choose from {CLIPPINGS} and {PASSES}")
        if not isinstance(memory_budget, int) or memory_budget < 0:
            raise ValueError(
                f"memory_budget is {memory_budget!r}; give a number of bytes, such as 2**28 (auto is for runs of "
                f"memsave, which plan a step first: privacy.memory_budget=auto)"
            )
        if clipping == "per_layer" and passes == 2:
            raise ValueError('clipping="per_layer" forms its sums in one pass; give passes="auto"')
        self.model, self.max_grad_norm, self.clipping, self.passes = model, max_grad_norm, clipping, passes
        self.batch_size, self.memory_budget = batch_size, memory_budget
        self.plan: dict[str, tuple[str, int]] = {}
        """By use of a parameter in the last backward: how its norm was found, and the bytes kept for its sum."""
        self.kept_bytes = 0
        """The bytes of `memory_budget` that the last backward spent."""
        self.clipped: Tensor | None = None
        """(B,) of the last backward: whether any part of the example's gradient was clipped."""
        self.chosen_passes: str | int | None = None if passes == "auto" else passes
        """The passes of the last backward; with passes="auto", None before the first one."""
        self._nonfinite: int | Tensor = 0
        self._unfinished = False
        self._is_local_sum = False  # whether .grad is the sum of this process alone
        self._independence = IndependenceSchedule()
        self._following = Following()
        self._context: BackwardContext | None = None  # of the model's last forward
        self._snapshot: StateSnapshot | None = None
        self._last_snapshot: StateSnapshot | None = None
        self._forward_is_running = self._is_copy = False
        self._handles: list[Any] = []
        self._attachment = Attachment(self, direct=passes == "direct", per_layer=clipping == "per_layer")
        self.attach()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, each once; the shards of those that FSDP shards."""
        return [self._attachment.sharding.shard(p) for p in self.model.parameters() if p.requires_grad]

    @property
    def unfinished(self) -> bool:
        """Whether a backward failed while it added to `.grad`, which since then contains a part of its sum."""
        if self._unfinished:
            shards = [self._attachment.sharding.shard(p) for p in self.model.parameters()]
            self._unfinished = any(bool(local_part(p.grad).any()) for p in shards if p.grad is not None)
        return self._unfinished

    @property
    def nonfinite(self) -> int:
        """The number of examples so far whose norm was not finite; they contributed zero."""
        return int(self._nonfinite)

    def backward(self, losses: Tensor, *, counted: Tensor | None = None) -> Tensor:
        """Add the clipped sum to `.grad`; returns the norms (B,) before clipping.

        Args:
            losses: (B,), those of the last forward.
            counted: (B,), zero for an example that must contribute nothing, such as padding of the batch; None counts
                all.
        """
        if losses.dim() != 1 or not (losses.requires_grad or not len(losses)):
            raise ValueError(
                f"losses have shape {tuple(losses.shape)}, requires_grad={losses.requires_grad}; give one loss per "
                f"example, shape (B,), with its graph"
            )
        if counted is not None and counted.shape != losses.shape:
            raise ValueError(
                f"counted has shape {tuple(counted.shape)} for {len(losses)} losses; give one number per example"
            )
        if self.unfinished:
            raise ValueError(
                "the last backward failed while it added to .grad, so that a part of its examples would count twice; "
                "clear the gradients (optimizer.zero_grad()) and begin the logical batch again"
            )
        refusals.refuse_without_group()
        refusals.refuse_other_group(self._processes)
        self._drop_frozen_sums()
        if not len(losses):  # an empty Poisson batch: a step of noise alone
            if self._attachment.sharding:
                raise ValueError(EMPTY_SHARE)
            norms, self._context, self.clipped = losses.detach(), None, losses.detach() < 0
        else:
            norms = self._clip_directly(losses, counted) if self.passes == "direct" else self._clip(losses, counted)
        followed = len(losses) and self.passes != "direct"  # the forward has found what is trainable
        for parameter in self._attachment.summed.values() if followed else self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._is_local_sum = self._processes > 1
        return norms

    def sum_gradients(self) -> None:
        """Sum `.grad` over all processes, once per logical batch; every process must call it. One process: nothing."""
        sum_gradients(self.parameters)
        self._is_local_sum = False

    def refuse_step(self, optimizer: Optimizer) -> None:
        """Raise ValueError for an optimizer step on the sum of this process alone."""
        if not self._is_local_sum:
            return
        ours = {id(p) for p in self._attachment.summed.values() if not is_sharded(p)}
        if any(id(p) in ours and p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                "optimizer.step() was called on the clipped sum of this process alone, so that the processes would "
                "train different models; call clipper.sum_gradients() after the last backward of a batch"
            )

    def _clip(self, losses: Tensor, counted: Tensor | None) -> Tensor:
        """Norms, clip factors, clipped sums; returns the norms (B,)."""
        sharding = self._attachment.sharding
        sharding.update(self.model)
        sharding.refuse_unsynchronised()
        context = self._checked_context(losses)
        parameters = [p for p in self._attachment.trainable.values() if p.requires_grad]
        self._choose_passes(context)
        context.ledger.counted, context.before_backward = counted, sharding.before_each_backward()
        adding = done = False
        try:
            squared = self._squared_norms(context, losses, parameters)
            with torch.no_grad(), without_autocast(context.probe.device.type):
                if sharding and context.ledger.has_remaining_groups:
                    raise ValueError(INCOMPLETE_GROUPS)
                context.ledger.clip_remaining_groups()
                norms = safe_sqrt(torch.zeros_like(context.probe) if squared is None else squared)
                factors = context.ledger.lowest_factors
                if self._attachment.groups is None:
                    factors = only_counted(self._clip_factors(norms), counted)
                self._record(norms, factors, counted)
                kept = context.examples_kept(factors) if self._attachment.groups is None else None
                adding = True
                if self._attachment.groups is None and self.chosen_passes == 1:
                    context.add_clipped_sums(factors, kept)
            if self.chosen_passes == 2:
                with sharding.reducing_sums():
                    context.add_clipped_sums_in_second_backward(losses, parameters, factors, kept)
            done = True
        except refusals.GradientWritten:
            adding = True
            raise
        finally:
            self._unfinished |= not done and (adding or bool(context.ledger.clipped_groups))
            context.finish()
            self._following.finish()
            self._context, self._snapshot, self.plan = None, None, context.ledger.plan
            self.kept_bytes = self.memory_budget - context.ledger.bytes_left
        return norms

    def _squared_norms(self, context: BackwardContext, losses: Tensor, parameters: list[nn.Parameter]) -> Tensor | None:
        """The squared norms (B,), after the checks that make them exact; None if there are no trainable parameters."""
        by_group = self._attachment.groups is not None  # groups add their sums in this backward
        unwritten = [] if by_group else [*self._attachment.trainable.items(), *self._attachment.summed.items()]
        with refusals.checkpoint_errors_explained(), refusals.written_gradients_refused(unwritten):
            self._check_independence(context, losses)
            with self._attachment.sharding.reducing_sums() if by_group else nullcontext():
                squared, of_parameters = context.measure_norms(
                    losses, parameters, keep_gradients=self.chosen_passes == 1
                )
        refusals.refuse_used_elsewhere(self._attachment.trainable, parameters, of_parameters)
        if squared is None and parameters:
            raise ValueError("the losses depend on no trainable layer of the model's last forward; give its own losses")
        return squared

    def _check_independence(self, context: BackwardContext, losses: Tensor) -> None:
        """Raise ValueError if the losses of some examples have gradients in other examples' rows."""
        subsets: list[Tensor] = []
        if context.batch_size > 1 and has_values(losses):
            unchecked = context.layers - self._independence.checked
            kind = self._independence.next_check(unchecked=bool(unchecked) and bool(unchecked & layers_reached(losses)))
            subsets = list(self._independence.subsets(kind, len(losses), losses.device)) if kind else []
        if self._attachment.sharding:
            subsets = same_number(subsets, len(losses), losses.device)
        if subsets:
            with raised_together() if self._attachment.sharding else nullcontext():
                self._independence.evaluate(context.check_independence(losses, subsets))

    def _clip_directly(self, losses: Tensor, counted: Tensor | None) -> Tensor:
        """passes="direct": form the gradient of the only loss, and clip it; returns its norm (1,)."""
        if len(losses) != 1:
            raise ValueError(f"passes='direct' is for one example, not {len(losses)}; set the micro-batch to 1")
        if self._context is None and any(True for _ in self.model.buffers()):
            raise ValueError("the model saw no forward, so changes of its buffers would not be seen; call the model")
        if self._context is None:  # parts of the model may have been called instead of the model
            hooks = refusals.gradient_hooks(self.model.named_parameters())
            raise_refusals([*refusals.batch_statistics(self.model.named_modules()), *hooks])
        else:
            self._checked_context(losses)
        done = False
        try:
            squared, lowest = add_clipped_gradient(
                losses,
                self.parameters,
                self._attachment.groups,
                lambda norms: only_counted(self._clip_factors(norms), counted),
            )
            done = True
        finally:
            self._unfinished |= not done
            self._context, self._snapshot = None, None
        norms = safe_sqrt(squared)
        self._record(norms, lowest, counted)
        return norms

    def _clip_factors(self, norms: Tensor) -> Tensor:
        """c (B,) from the norms (B,) of whole gradients, or of one group's gradients."""
        bound = (
            self.max_grad_norm
            if self._attachment.groups is None
            else self._attachment.groups.bound_of_each(self.max_grad_norm)
        )
        return clip_factors(norms, bound, clipping=self.clipping)

    def _record(self, norms: Tensor, factors: Tensor, counted: Tensor | None) -> None:
        every = torch.ones_like(norms, dtype=torch.bool) if counted is None else counted != 0
        self._nonfinite = self._nonfinite + (~norms.isfinite() & every).sum()
        self.clipped = (factors < 1) & every

    def _checked_context(self, losses: Tensor) -> BackwardContext:
        """The context of the last forward, if these can be its losses and nothing in it was refused."""
        context = self._context
        if context is None or (len(losses) != context.batch_size and self.passes != "direct"):
            seen = "no forward" if context is None else f"a batch of {context.batch_size}"
            raise ValueError(f"there are {len(losses)} losses, but the model saw {seen}; give one loss per example")
        frozen = refusals.frozen_after_forward(self._attachment.trainable, context.ledger.uses)
        raise_refusals([*context.refusals, *frozen])
        if self.passes == "direct" or self._attachment.groups is not None:  # these add sums as soon as they have them
            context.late.raise_failed()
        return context

    def passes_for(self, context: BackwardContext) -> str | int:
        """The passes that the backward of this forward takes."""
        return self._passes_and_reason(context)[0] if self.passes == "auto" else self.passes

    def _passes_and_reason(self, context: BackwardContext) -> tuple[int, str]:
        if self._attachment.groups is not None:
            return 1, "each layer's sum is formed during the backward"
        if self._attachment.sharding:
            return 2, "FSDP reduces the gradients of each module during the backward"
        if not (context.recomputes or context.offloads):
            return 1, "activations are stored"
        # for one example, only its gradient is kept, and it becomes the sum if there is no .grad yet
        held = sum(
            p.grad.numel() * p.grad.element_size() for p in self._attachment.summed.values() if p.grad is not None
        )
        if context.batch_size == 1 and held <= self.memory_budget:
            return 1, "one example's gradient takes no more memory than the sum"
        where = "recomputed" if context.recomputes else "copied back from the host"
        return 2, f"activations are {where} in the backward"

    def _choose_passes(self, context: BackwardContext) -> None:
        if self.passes == "auto":
            chosen, reason = self._passes_and_reason(context)
            if chosen != self.chosen_passes:
                log.info("passes='auto' takes %d: %s", chosen, reason)
            self.chosen_passes = chosen

    def attach(self) -> None:
        """Patch the model's layers, as the constructor does; for a clipper that was closed."""
        refusals.refuse_without_group()
        self._processes = process_count()
        self._independence.reset()
        self._following.reset()
        self._attachment.attach(self.model)
        self._handles.append(self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(self._after_forward, always_call=True))
        if self._processes > 1:
            self._handles.append(register_optimizer_step_pre_hook(_step_pre_hook(ref(self))))

    def close(self) -> None:
        """Restore the model."""
        for handle in self._handles:
            handle.remove()
        self._attachment.detach()
        self._following.reset()
        self._handles, self._context, self._forward_is_running = [], None, False
        self._snapshot = self._last_snapshot = None

    def holds(self, parameter: Tensor) -> bool:
        """Whether it was a trainable parameter of the model when the layers were attached."""
        return self._attachment.holds(parameter)

    def _reattach_if_changed(self, model: nn.Module, modules: list[tuple[str, nn.Module]]) -> None:
        """Attach the layers again if other parameters are trainable than before: unfrozen layers, new adapters."""
        if self._attachment.is_current(model, modules):
            return
        self._drop_frozen_sums()
        self._attachment.detach()
        self._independence.reset()
        self._following.reset()
        self._attachment.attach(model)

    def _drop_frozen_sums(self) -> None:
        """Drop the sum of a parameter that was frozen since: it would move the parameter without noise."""
        for name, parameter in self._attachment.summed.items():
            if not parameter.requires_grad and parameter.grad is not None:
                log.warning("%s was frozen after it got a clipped sum, which is dropped", name)
                parameter.grad = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "GhostClipper":
        """For a copy of the model, which has no clipper: the copy does nothing."""
        copy = memo[id(self)] = object.__new__(GhostClipper)
        copy._is_copy = True
        return copy

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start the context of a forward."""
        if self._is_copy or not torch.is_grad_enabled() or in_backward():
            return
        modules = list(model.named_modules())
        self._reattach_if_changed(model, modules)
        trained = [*self._attachment.trainable.items(), *self._attachment.summed.items()]
        raise_refusals([*refusals.batch_statistics(modules), *refusals.gradient_hooks(trained)])
        first, grouped = next(tensors_in([*args, *kwargs.values()]), None), current_example_rows()
        self._context = BackwardContext(
            self._new_probe(first, grouped),
            rows=STANDARD if grouped is None else grouped.rows,
            memory_budget=self.memory_budget,
            groups=self._attachment.groups,
            clip_factors_of=self._clip_factors,
        )
        self._forward_is_running = True
        if self._independence.begin_forward(module for _, module in modules):
            self._following.reset()
        shard_of = self._attachment.sharding.local
        self._snapshot = StateSnapshot(modules, shard_of=shard_of, earlier=self._last_snapshot)
        self._last_snapshot = self._snapshot
        if self.passes != "direct":
            inputs = tensors_in([*args, *kwargs.values()])
            trainable, has_rules = self._attachment.trainable, self._attachment.has_rules
            self._following.begin(self._context, trainable, inputs, has_rules=has_rules)

    def _new_probe(self, first: Tensor | None, grouped: ExampleRows | None) -> Tensor:
        """The probe (B,) of a forward, with the batch size of its first tensor argument, or of `example_rows`."""
        has_batch = first is not None and first.dim() > 0
        if grouped is not None and first is not None and has_batch and len(first) != len(grouped.of_row):
            raise ValueError(
                f"the model got {len(first)} rows, but example_rows names the examples of {len(grouped.of_row)}; give "
                f"one number for each row"
            )
        if self.batch_size is None and self.passes != "direct" and not has_batch:
            raise ValueError(
                "the model got no tensor whose dimension 0 could be the batch; pass the inputs as tensors, or give the "
                "GhostClipper a batch_size"
            )
        size = len(first) if self.batch_size is None and first is not None and has_batch else self.batch_size
        size = size if grouped is None else grouped.examples
        parameters = list(self._attachment.trainable.values())
        is_double = any(p.dtype in (torch.float64, torch.complex128) for p in parameters)
        like = parameters[0] if parameters else first
        return torch.zeros(
            1 if size is None else size,
            dtype=torch.float64 if is_double else torch.float32,
            device=None if like is None else like.device,
            requires_grad=True,
        )

    def _after_forward(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        """Raise what the forward found; `output` is None if it failed."""
        if self._is_copy or in_backward() or not self._forward_is_running:
            return
        self._forward_is_running = False
        self._following.end(tensors_in([output]))
        if self._context is not None and output is not None:
            changes = self._snapshot.changes(self._context.late) if self._snapshot is not None else ()
            found = [*self._context.refusals, *changes]
            self._snapshot = None
            if found:
                self._context = None
            raise_refusals(found)

    def context_for(self, layer: str, *, after_forward: bool = False) -> BackwardContext | None:
        """The context of the current forward for a layer's use, or None when gradients are disabled.

        `after_forward`: the use may also come after the model's forward, with its output.
        """
        context = self._context
        if not torch.is_grad_enabled():
            if context is not None and self._forward_is_running and not in_backward():
                context.record_run_without_grad(layer)
            return None
        if context is None or not (self._forward_is_running or in_backward() or after_forward):
            raise RuntimeError(
                f"{layer} was called outside the model's own forward, so its batch is not known; call the model that "
                f"the GhostClipper was given"
            )
        if in_backward() and context.ran_only_without_grad(layer):
            raise ValueError(
                f"{layer} ran without grad in the forward and with it in the backward, so it would be differentiated "
                f"by a backward inside the backward (reentrant checkpoints and some reversible layers do that); freeze "
                f"it, or use memsave.reversible or checkpoints with use_reentrant=False"
            )
        return context


def _step_pre_hook(clipper: "ReferenceType[GhostClipper]") -> Any:
    """A hook on all optimizers; the weak reference does not keep the clipper alive."""

    def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        alive = clipper()
        if alive is not None:
            alive.refuse_step(optimizer)

    return hook
