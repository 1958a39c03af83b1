"""`verify`: compare the clipper with one backward per example, on a given model and batch."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memsave.ghost.clipper import GhostClipper
from memsave.ghost.groups import Groups, clip_factors, groups_by_layer
from memsave.ghost.layer_patch import LayerPatch
from memsave.ghost.refusals import source_of
from memsave.ghost.sharding import refuse_sharded
from memsave.tf32 import without_tf32

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
FLOOR = 1e-3  # of an example's whole gradient: a parameter with less than that is mostly rounding
Losses = Callable[[nn.Module, Any], Tensor]


@dataclass
class ClippingReport:
    """The findings of `verify`; `print` it."""

    findings: list[str] = field(default_factory=list)
    """One sentence for each error."""
    checked: int = 0
    """The number of parameters that were compared."""

    @property
    def ok(self) -> bool:
        """Whether everything agreed."""
        return not self.findings

    def __str__(self) -> str:
        if self.ok:
            return f"exact: norms and clipped sums of {self.checked} parameters agree with one backward per example"
        return "\n".join(self.findings)


def verify(
    model: nn.Module,
    batch: Any,
    per_example_losses: Losses,
    *,
    passes: str | int = "auto",
    clipping: str = "flat",
) -> ClippingReport:
    """Compare the clipper with each `losses[i]` differentiated alone, on the same batch and random numbers.

    Also checks that example 0's gradient does not change when the other examples are replaced by copies of it, and, in
    eval mode, when it is alone. If the batch is a mapping with an "attention_mask" (B, T), also checks that the
    gradient of the most padded example does not change when it is alone without its padding, which is removed from all
    tensors (B, T, ...). A batch is a tensor, or tensors in mappings and sequences; tensors with one entry in dimension
    0 for each loss hold the examples. The model, its gradients and the random state do not change. Takes the time of B
    backward passes, on a copy of the model and without TF32.

    Raises ValueError for a model that is sharded or whose forward is replaced, TypeError for a batch of another kind.
    """
    refuse_sharded(model, "verify")
    _refuse_replaced_forwards(model)
    report = ClippingReport()
    try:
        GhostClipper(model, max_grad_norm=1.0, passes=passes, clipping=clipping).close()
    except ValueError as refusal:
        report.findings.append(str(refusal))
        return report
    model = copy.deepcopy(model)
    report.checked = len(_trainable(model))
    device = next(model.parameters()).device
    with without_tf32(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        seed = torch.seed()
        norms, sums, bound = _plain_loop(model, batch, per_example_losses, clipping=clipping, seed=seed)
        if not norms.isfinite().all():
            report.findings.append("a plain gradient is not finite on this batch: give verify finite examples")
            return report
        torch.manual_seed(seed)
        model.zero_grad()
        clipper = GhostClipper(model, max_grad_norm=bound, passes=passes, clipping=clipping)
        try:
            ours = clipper.backward(per_example_losses(model, batch))
            _compare(report, model, sums, norms, ours, bound=bound)
        except ValueError as refusal:
            report.findings.append(str(refusal))
        finally:
            clipper.close()
        _check_batch_mates(report, model, batch, per_example_losses, len(norms), seed=seed)
        _check_padding(report, model, batch, per_example_losses, len(norms), seed=seed)
    return report


def _refuse_replaced_forwards(model: nn.Module) -> None:
    """Raise ValueError for replaced forwards that would still call the original in a copy of the model.

    A method is copied with its object, and a function is not.
    """
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        owner = getattr(forward, "__self__", None)
        if isinstance(owner, LayerPatch):
            raise ValueError("a GhostClipper is attached to this model; close it, then verify")
        copied = owner is not None and not hasattr(type(owner), "__deepcopy__")
        if forward is not None and owner is not module and not copied:
            raise ValueError(
                f"the forward of {name or 'the model'} was replaced ({source_of(forward)}), and would call the "
                f"original in a copy of the model; verify the model before that"
            )


def _plain_loop(
    model: nn.Module, batch: Any, per_example_losses: Losses, *, clipping: str, seed: int
) -> tuple[Tensor, list[Tensor], float]:
    """Norms (B,), the clipped sum of each parameter, and the bound: example 0's norm, so that some are clipped."""
    torch.manual_seed(seed)
    parameters = _trainable(model)
    norms, sums, bound = [], [torch.zeros_like(p, dtype=torch.float64) for p in parameters], 1.0
    groups = groups_by_layer(model) if clipping == "per_layer" else Groups.single(parameters)
    for example, loss in enumerate(per_example_losses(model, batch)):
        gradient = dict(zip(parameters, _gradient(model, loss), strict=True))
        norms.append(_norm(list(gradient.values())))
        if example == 0:
            bound = norms[0].item() or 1.0
        of_group = [_norm([gradient[p] for p in members]) for members in groups.members]
        factors = [clip_factors(norm, groups.bound_of_each(bound), clipping=clipping) for norm in of_group]
        for total, p in zip(sums, parameters, strict=True):
            total += factors[groups.index[p]] * gradient[p]
    return torch.stack(norms), sums, bound


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _gradient(model: nn.Module, loss: Tensor) -> list[Tensor]:
    parameters = _trainable(model)
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def _norm(gradient: list[Tensor]) -> Tensor:
    return torch.stack([g.double().square().sum() for g in gradient]).sum().sqrt()


def _compare(
    report: ClippingReport, model: nn.Module, sums: list[Tensor], norms: Tensor, ours: Tensor, *, bound: float
) -> None:
    tolerance = TOLERANCE.get(next(model.parameters()).dtype, 1e-2)
    for example, (one, other) in enumerate(zip(ours.tolist(), norms.tolist(), strict=True)):
        if not abs(one - other) <= tolerance * other + 1e-12 * bound:
            report.findings.append(f"example {example}: the clipper's norm is {one:.6g}, the gradient's {other:.6g}")
    named = [name for name, p in model.named_parameters() if p.requires_grad]
    for name, expected in zip(named, sums, strict=True):
        found = model.get_parameter(name).grad
        assert found is not None
        difference = (found.double() - expected).norm().item()
        if not difference <= tolerance * (expected.norm().item() + FLOOR * bound):
            report.findings.append(
                f"{name}: the clipped sum is off by {difference:.3g} of {expected.norm().item():.3g}"
            )


def _check_batch_mates(
    report: ClippingReport, model: nn.Module, batch: Any, per_example_losses: Losses, size: int, *, seed: int
) -> None:
    """Compare example 0 in its batch, among copies of itself, and alone."""
    changes = {
        "its batch-mates do": (lambda each: each[:1].expand_as(each).clone(), True),  # with the same dropout masks
        "it is alone": (lambda each: each[:1], False),  # without dropout, whose masks would differ
    }
    training = [module for module in model.modules() if module.training]
    for change, (exchanged, with_dropout) in changes.items():
        for module in training:
            module.training = with_dropout
        before, after = (
            _gradient_of(0, model, each, per_example_losses, seed=seed)
            for each in (batch, _examples(batch, size, exchanged))
        )
        tolerance = TOLERANCE.get(next(model.parameters()).dtype, 1e-2)
        difference, scale = _norm([a - b for a, b in zip(after, before, strict=True)]).item(), _norm(before).item()
        if not difference <= tolerance * scale:
            report.findings.append(
                f"example 0's gradient changes by {difference:.3g} of {scale:.3g} when {change}: the loss or a layer "
                f"mixes examples; normalise each loss by its own example alone"
            )


def _check_padding(
    report: ClippingReport, model: nn.Module, batch: Any, per_example_losses: Losses, size: int, *, seed: int
) -> None:
    """Compare the most padded example in its batch, and alone without the columns where its mask is zero."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or len(mask) != size:
        return
    kept = mask != 0
    zeros = torch.where(kept.sum(1) > 1, (~kept).sum(1), 0)  # a single token predicts nothing
    example = int(zeros.argmax())
    if not zeros[example]:
        return

    def alone(each: Tensor) -> Tensor:
        row = each[example : example + 1]
        return row[:, kept[example].to(row.device)] if each.shape[:2] == mask.shape else row

    for module in model.modules():
        module.training = False
    before = _gradient_of(example, model, batch, per_example_losses, seed=seed)
    after = _gradient_of(0, model, _examples(batch, size, alone), per_example_losses, seed=seed)
    tolerance = TOLERANCE.get(next(model.parameters()).dtype, 1e-2)
    difference, scale = _norm([a - b for a, b in zip(after, before, strict=True)]).item(), _norm(before).item()
    if not difference <= tolerance * scale:
        report.findings.append(
            f"example {example}'s gradient changes by {difference:.3g} of {scale:.3g} without its padding, "
            f"{int(zeros[example])} of {mask.shape[1]} columns: the positions, the attention or the targets count "
            f"padding; give position_ids that do not, predict nothing from padding, or pad on the right"
        )


def _gradient_of(example: int, model: nn.Module, batch: Any, per_example_losses: Losses, *, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    return _gradient(model, per_example_losses(model, batch)[example])


def _examples(batch: Any, size: int, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with `change` applied to every tensor of `size` entries."""
    if isinstance(batch, Tensor):
        return change(batch) if batch.dim() and len(batch) == size else batch
    if isinstance(batch, Mapping):
        return {key: _examples(value, size, change) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [_examples(value, size, change) for value in batch]
    if isinstance(batch, (str, int, float, bool, type(None))):
        return batch
    raise TypeError(
        f"verify cannot exchange the examples of a {type(batch).__name__}; give tensors in a dict or a list"
    )
