"""Clipping by group: each layer's gradient is clipped to its share of the bound (He et al., 2022, arXiv 2212.01539).

With K groups, group k of example b is scaled to a norm of at most C / sqrt(K), so that the whole has at most C:

    sum_k c_bk g_bk,    c_bk = min(1, C / (sqrt(K) |g_bk|))

A group's sum needs no norm of another group: it is formed as soon as the backward has passed the group, and nothing of
the group is kept. A group consists of the trainable parameters of one layer; layers that share a parameter form one
group.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

AUTOMATIC_GAMMA = 0.01  # Bu et al., "Automatic Clipping" (2022)


@dataclass(frozen=True)
class Groups:
    """A partition of the trainable parameters; it depends on the model alone, never on the data."""

    members: tuple[tuple[nn.Parameter, ...], ...]
    index: dict[nn.Parameter, int]
    """The group of each parameter."""

    @classmethod
    def of(cls, members: Iterable[Iterable[nn.Parameter]]) -> "Groups":
        """The partition into these groups."""
        groups = tuple(tuple(group) for group in members)
        return cls(groups, {p: number for number, group in enumerate(groups) for p in group})

    @classmethod
    def single(cls, parameters: Iterable[nn.Parameter]) -> "Groups":
        """All parameters in one group."""
        return cls.of([parameters])

    def bound_of_each(self, max_grad_norm: float) -> float:
        """C / sqrt(K)."""
        return max_grad_norm / max(1, len(self.members)) ** 0.5


def groups_by_layer(model: nn.Module, *, copy_of: Callable[[nn.Parameter], nn.Parameter] = lambda p: p) -> Groups:
    """One group for each module that owns trainable parameters; modules that share a parameter form one group.

    `copy_of`: which copy of a sharded parameter is clipped.
    """
    found: list[dict[nn.Parameter, None]] = []
    for module in model.modules():
        merged = dict.fromkeys(copy_of(p) for p in module.parameters(recurse=False) if p.requires_grad)
        disjoint = [group for group in found if not merged.keys() & group.keys()]
        for group in found:
            if merged.keys() & group.keys():
                merged = group | merged
        found = [*disjoint, merged] if merged else found
    return Groups.of(found)


def only_counted(factors: Tensor, counted: Tensor | None) -> Tensor:
    """The factors (B,), zero for examples whose `counted` (B,) is zero; None counts all."""
    return factors if counted is None else torch.where(counted != 0, factors, 0.0)


def clip_factors(norms: Tensor, bound: float, *, clipping: str) -> Tensor:
    """min(1, C / norm), or C / (norm + 0.01) if `clipping` is "automatic"; zero for a norm that is not finite."""
    if clipping == "automatic":
        factors = bound / (norms + AUTOMATIC_GAMMA)
    else:  # a norm of zero gives infinity, and so 1
        factors = (bound / norms).clamp(max=1.0)
    return torch.where(norms.isfinite(), factors, torch.zeros_like(factors))
