"""Clipping by group: each layer's gradient to its share of the bound (He et al., 2022, arXiv 2212.01539).

With K groups, group k of example b is scaled to a norm of at most C / sqrt(K), so that the whole has at most C:

    sum_k c_bk g_bk,    c_bk = min(1, C / (sqrt(K) |g_bk|))

A group's sum needs no other group's norm: it is formed as soon as the backward has passed the group, and nothing of it
is kept. A group is the trainable parameters of one layer; layers that share a parameter are one group.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Groups:
    """A partition of the trainable parameters; it depends on the model alone, never on what was run."""

    members: tuple[tuple[nn.Parameter, ...], ...]
    number: dict[nn.Parameter, int]
    """The group of each parameter."""

    def share(self, bound: float) -> float:
        """C / sqrt(K)."""
        return bound / max(1, len(self.members)) ** 0.5


def groups_of(layers: Iterable[Sequence[nn.Parameter]]) -> Groups:
    """The parameters of each layer; those of layers that share one are together."""
    found: list[dict[nn.Parameter, None]] = []
    for parameters in layers:
        joined = dict.fromkeys(parameters)
        apart = []
        for group in found:
            if joined.keys() & group.keys():
                joined = group | joined
            else:
                apart.append(group)
        found = [*apart, joined]
    members = tuple(tuple(group) for group in found if group)
    return Groups(members, {p: number for number, group in enumerate(members) for p in group})
