"""passes="direct": the gradient of a single example is formed by an ordinary backward and clipped, for any layers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from memsave.ghost.gradients import PerSampleGrad, has_values, safe_sqrt
from memsave.ghost.groups import Groups
from memsave.ghost.ledger import add_sum


def add_clipped_gradient(
    losses: Tensor, parameters: list[nn.Parameter], groups: Groups | None, clip_factors_of: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Add the clipped gradient of the only loss, (1,), to `.grad`.

    Returns the squared norm and the smallest clip factor of any group, (1,) each.
    """
    found = torch.autograd.grad(losses[0], parameters, allow_unused=True)
    gradients = {
        p: torch.view_as_real(g) if g.is_complex() else g
        for p, g in zip(parameters, found, strict=True)
        if g is not None
    }
    squared, lowest = losses.detach() * 0, torch.ones_like(losses)
    for group in (groups or Groups.single(gradients)).members:
        members = [p for p in group if p in gradients]
        upcasts = (gradients[p].to(torch.promote_types(gradients[p].dtype, torch.float32)) for p in members)
        squared_of_group = sum((each.square().sum()[None] for each in upcasts), losses.detach() * 0)
        factors = clip_factors_of(safe_sqrt(squared_of_group))
        squared, lowest = squared + squared_of_group, torch.minimum(lowest, factors)
        if not has_values(factors) or bool(factors.all()):  # a zero factor marks a gradient that is not finite
            for p in members:
                add_sum(p, PerSampleGrad(gradients[p][None]), factors)
    return squared, lowest
