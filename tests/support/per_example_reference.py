"""The reference for a clipper: each loss differentiated alone, on the same batch and random numbers."""

import copy

import torch

from memsave.ghost import GhostClipper


def by_loop(model, batch, per_example_losses, *, max_grad_norm, clipping="flat", seed=0):
    """(norms (B,), clipped sum by parameter name) from one backward per example."""
    torch.manual_seed(seed)
    losses = per_example_losses(model, batch)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    norms, sums = [], {name: torch.zeros_like(p) for name, p in named.items()}
    for loss in losses:
        gradients = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, named.values(), strict=True)]
        norm = torch.stack([g.abs().square().sum() for g in gradients]).sum().sqrt()
        factor = max_grad_norm / (norm + 0.01) if clipping == "automatic" else (max_grad_norm / norm).clamp(max=1.0)
        norms.append(norm)
        for name, gradient in zip(named, gradients, strict=True):
            sums[name] += factor * gradient
    return torch.stack(norms).detach(), sums


def by_clipper(model, batch, per_example_losses, *, seed=0, **options):
    """(norms (B,), clipped sum by parameter name) from a GhostClipper."""
    model = copy.deepcopy(model)
    clipper = GhostClipper(model, **options)
    model.zero_grad()
    torch.manual_seed(seed)
    norms = clipper.backward(per_example_losses(model, batch))
    sums = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    clipper.close()
    return norms.detach(), sums


def assert_exact(model, batch, per_example_losses, *, passes=(1, 2), rtol=1e-9, clippings=("flat",)):
    """Norms and clipped sums within `rtol`, and 1e-12 of max_grad_norm, of the loop's."""
    for clipping in clippings:
        free, _ = by_loop(model, batch, per_example_losses, max_grad_norm=1.0)
        bound = free.median().item() if free.median() > 1e-12 else 1.0  # some examples are clipped and some are not
        norms, sums = by_loop(model, batch, per_example_losses, max_grad_norm=bound, clipping=clipping)
        for number in passes:
            options = {"max_grad_norm": bound, "clipping": clipping, "passes": number}
            ours, our_sums = by_clipper(model, batch, per_example_losses, **options)
            torch.testing.assert_close(ours, norms, rtol=rtol, atol=1e-12 * bound)
            assert our_sums.keys() == sums.keys()
            for name, total in sums.items():
                difference = (our_sums[name] - total).norm()
                assert difference <= rtol * total.norm() + 1e-12 * bound, (name, number, difference, total.norm())
