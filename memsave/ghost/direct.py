"""One example whose gradient is formed as ever, whatever the layers, and clipped."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from memsave.ghost.gradients import Dense, has_values
from memsave.ghost.groups import Groups
from memsave.ghost.tap import add_sum, root


def add_formed_gradient(
    losses: Tensor, parameters: list[nn.Parameter], groups: Groups | None, factors_of: Callable[[Tensor], Tensor]
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
    squares, lowest = losses.detach() * 0, torch.ones_like(losses)
    for group in (groups or Groups.whole(gradients)).members:
        members = [p for p in group if p in gradients]
        wides = (gradients[p].to(torch.promote_types(gradients[p].dtype, torch.float32)) for p in members)
        squared = sum((each.square().sum()[None] for each in wides), losses.detach() * 0)
        factors = factors_of(root(squared))
        squares, lowest = squares + squared, torch.minimum(lowest, factors)
        if not has_values(factors) or bool(factors.all()):  # finite
            for p in members:
                add_sum(p, Dense(gradients[p][None]), factors)
    return squares, lowest
