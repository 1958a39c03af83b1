"""The reference for units: each record in a batch of its own, ordinary autograd, one loss for each unit."""

import torch

from tests.support.per_example_reference import by_clipper


def gradients_alone(task, model, index):
    """The gradient of each trained parameter, of the mean or sum of the losses of a unit's records."""
    losses = []
    for record in task.records(index):
        batch = task.task.place(task.task.load([record]))
        losses.append(task.task.per_example_losses(model, batch).squeeze(0))
    loss = torch.stack(losses).mean() if task.keys.unit_loss == "mean" else torch.stack(losses).sum()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


def assert_units_exact(task, model, indices, *, passes=(1, 2), rtol=1e-9):
    """The clipper's norms and clipped sums are those of the units alone; some are clipped and some are not."""
    each = [gradients_alone(task, model, index) for index in indices]
    norms = torch.stack([torch.stack([g.square().sum() for g in unit.values()]).sum().sqrt() for unit in each])
    bound = norms.median().item()
    factors = (bound / norms).clamp(max=1.0)
    batch = task.place(task.load(indices))
    for number in passes:
        options = {"max_grad_norm": bound, "passes": number}
        ours, sums = by_clipper(model, batch, task.per_example_losses, **options)
        torch.testing.assert_close(ours, norms, rtol=rtol, atol=1e-12 * bound)
        for name, found in sums.items():
            expected = sum(factor * unit[name] for factor, unit in zip(factors, each, strict=True))
            difference = (found - expected).norm()
            assert difference <= rtol * expected.norm() + 1e-12 * bound, (name, number, difference)
    return norms
