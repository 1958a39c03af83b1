"""Clipping by group: each layer's gradient to its share of the bound (He et al., 2022, arXiv 2212.01539).

With K groups, group k of example b is scaled to a norm of at most C / sqrt(K), so that the whole has at most C:

    sum_k c_bk g_bk,    c_bk = min(1, C / (sqrt(K) |g_bk|))

A group's sum needs no other group's norm: it is formed as soon as the backward has passed the group, and nothing of it
is kept. A group is the trainable parameters of one layer; layers that share a parameter are one group.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

AUTOMATIC_GAMMA = 0.01  # Bu et al., "Automatic Clipping" (2022)


@dataclass(frozen=True)
class Groups:
    """A partition of the trainable parameters; it depends on the model alone, never on what was run."""

    members: tuple[tuple[nn.Parameter, ...], ...]
    number: dict[nn.Parameter, int]
    """The group of each parameter."""

    @classmethod
    def of(cls, members: Iterable[Iterable[nn.Parameter]]) -> "Groups":
        """These groups."""
        groups = tuple(tuple(group) for group in members)
        return cls(groups, {p: number for number, group in enumerate(groups) for p in group})

    @classmethod
    def whole(cls, parameters: Iterable[nn.Parameter]) -> "Groups":
        """All of them as one group."""
        return cls.of([parameters])

    def share(self, bound: float) -> float:
        """C / sqrt(K)."""
        return bound / max(1, len(self.members)) ** 0.5


def layers_of(model: nn.Module) -> Groups:
    """The trainable parameters of each module that owns some; modules that share a parameter are one group."""
    found: list[dict[nn.Parameter, None]] = []
    for module in model.modules():
        joined = dict.fromkeys(p for p in module.parameters(recurse=False) if p.requires_grad)
        apart = [group for group in found if not joined.keys() & group.keys()]
        for group in found:
            if joined.keys() & group.keys():
                joined = group | joined
        found = [*apart, joined] if joined else found
    return Groups.of(found)


def clip_factors(norms: Tensor, bound: float, *, clipping: str) -> Tensor:
    """min(1, C / norm), or C / (norm + 0.01) where `clipping` is "automatic"; zero for what is not finite."""
    if clipping == "automatic":
        factors = bound / (norms + AUTOMATIC_GAMMA)
    else:  # a zero norm gives infinity, and so 1
        factors = (bound / norms).clamp(max=1.0)
    return torch.where(norms.isfinite(), factors, torch.zeros_like(factors))
