"""Is this model clipped exactly on this batch? The clipper against the plain loop, in plain words."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memsave.ghost.clipper import GhostClipper

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
Losses = Callable[[nn.Module, Any], Tensor]


@dataclass
class Verification:
    """What was found; `print` it."""

    findings: list[str] = field(default_factory=list)
    """One sentence for each thing that is wrong."""
    checked: int = 0
    """Parameters compared."""

    @property
    def ok(self) -> bool:
        """Whether everything agreed."""
        return not self.findings

    def __str__(self) -> str:
        if self.ok:
            return f"exact: norms and clipped sums of {self.checked} parameters agree with one backward per example"
        return "\n".join(self.findings)


def verify(model: nn.Module, batch: Any, per_example_losses: Losses, *, passes: str | int = "auto") -> Verification:
    """Compare the clipper with each `losses[i]` differentiated alone, on the same batch and random numbers.

    Also checks that example 0's gradient stays when its batch-mates are exchanged for copies of it. Leaves the model,
    its gradients and the random state as they were; takes the time of B backward passes, on a copy of the model.
    """
    if any("forward" in vars(module) for module in model.modules()):
        raise ValueError("the forward of this model is replaced, by a GhostClipper perhaps; close it, then verify")
    model, report = copy.deepcopy(model), Verification()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    report.checked = len(names)
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        seed = torch.seed()
        gradients = _each_alone(model, batch, per_example_losses, seed=seed)  # by example, by parameter
        norms = torch.stack([_norm(each) for each in gradients])
        bound = norms[norms.isfinite()].median().clamp(min=1e-12).item()
        torch.manual_seed(seed)
        clipper = GhostClipper(model, max_grad_norm=bound, passes=passes)
        model.zero_grad()
        ours = clipper.backward(per_example_losses(model, batch))
        clipper.close()
        _compare(report, names, model, gradients, norms, ours, bound=bound)
        _exchange_batch_mates(report, model, batch, per_example_losses, gradients[0], seed=seed)
    return report


def _each_alone(model: nn.Module, batch: Any, per_example_losses: Losses, *, seed: int) -> list[list[Tensor]]:
    torch.manual_seed(seed)
    losses = per_example_losses(model, batch)
    return [_gradient(model, loss) for loss in losses]


def _gradient(model: nn.Module, loss: Tensor) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def _norm(gradient: list[Tensor]) -> Tensor:
    return torch.stack([g.double().square().sum() for g in gradient]).sum().sqrt()


def _compare(
    report: Verification,
    names: list[str],
    model: nn.Module,
    gradients: list[list[Tensor]],
    norms: Tensor,
    ours: Tensor,
    *,
    bound: float,
) -> None:
    tolerance = TOLERANCE.get(next(model.parameters()).dtype, 1e-2)
    for example, (one, other) in enumerate(zip(ours.tolist(), norms.tolist(), strict=True)):
        if not abs(one - other) <= tolerance * other + 1e-12 * bound:
            report.findings.append(f"example {example}: the clipper's norm is {one:.6g}, the gradient's {other:.6g}")
    factors = (bound / norms).clamp(max=1.0)
    for place, name in enumerate(names):
        expected = sum(f * g[place].double() for f, g in zip(factors, gradients, strict=True))
        assert isinstance(expected, Tensor)
        found = model.get_parameter(name).grad
        assert found is not None
        difference = (found.double() - expected).norm().item()
        if not difference <= tolerance * expected.norm().item() + 1e-6 * bound * tolerance:
            report.findings.append(
                f"{name}: the clipped sum is off by {difference:.3g} of {expected.norm().item():.3g}"
            )


def _exchange_batch_mates(
    report: Verification, model: nn.Module, batch: Any, per_example_losses: Losses, before: list[Tensor], *, seed: int
) -> None:
    torch.manual_seed(seed)
    after = _gradient(model, per_example_losses(model, _copies_of_first(batch))[0])
    tolerance = TOLERANCE.get(next(model.parameters()).dtype, 1e-2)
    difference = _norm([a - b for a, b in zip(after, before, strict=True)])
    if not difference <= tolerance * _norm(before):
        report.findings.append(
            f"example 0's gradient changes by {difference.item():.3g} of {_norm(before).item():.3g} when its "
            f"batch-mates do: the loss or a layer mixes examples; normalise each loss by its own example alone"
        )


def _copies_of_first(batch: Any) -> Any:
    """The batch with every example exchanged for a copy of the first."""
    if isinstance(batch, Tensor):
        return batch[:1].expand_as(batch).clone()
    if isinstance(batch, Mapping):
        return {key: _copies_of_first(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [_copies_of_first(value) for value in batch]
    if isinstance(batch, (str, int, float, bool, type(None))):
        return batch
    raise TypeError(
        f"verify cannot exchange the examples of a {type(batch).__name__}; give tensors in a dict or a list"
    )
