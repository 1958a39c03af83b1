"""Mobile inverted bottlenecks in 3D, the branches of the reversible U-Net.

    expand      1x1x1 convolution      C -> e C        GroupNorm, SiLU
    filter      depthwise 3x3x3        e C -> e C      GroupNorm, SiLU, squeeze-excitation (optional)
    project     1x1x1 convolution      e C -> C        GroupNorm, no activation (a linear bottleneck)

Sandler et al., "MobileNetV2" (2018); squeeze-excitation as in Howard et al., "MobileNetV3" (2019). Stored, the expanded
tensors dominate the memory: about 37 times the block's input for a coupling of two branches with e = 6.

A branch can also recompute itself over chunks of its expanded channels (`chunks.py`). `ReversibleSequence` uses this,
and then only one chunk of them exists at a time.
"""

from collections.abc import Callable
from math import gcd

import torch
from torch import Tensor, nn

from memsave.models import chunks as chunked
from memsave.models.depthwise import depthwise_conv3d
from memsave.models.norm import GroupNorm
from memsave.models.pointwise import PointwiseConv3d

NORM_GROUPS = 8


class DepthwiseConv3d(nn.Conv3d):
    """`nn.Conv3d(channels, channels, kernel_size, groups=channels, padding="same")`, run by `depthwise_conv3d`."""

    def __init__(self, channels: int, *, kernel_size: int = 3, bias: bool = False):
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}; give an odd number, which keeps the size of the volume")
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to the same shape."""
        return depthwise_conv3d(x, self.weight, self.bias)


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate computed from the means of all channels (Hu et al. 2018)."""

    def __init__(self, channels: int, *, hidden: int):
        super().__init__()
        self.reduce = nn.Conv3d(channels, hidden, 1)
        self.expand = nn.Conv3d(hidden, channels, 1)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to the same shape."""
        means = x.mean(dim=(2, 3, 4), keepdim=True)  # (B, C, 1, 1, 1)
        return x * torch.sigmoid(self.expand(self.act(self.reduce(means))))


class MBConv3d(nn.Module):
    """An inverted bottleneck without a residual connection: (B, C, D, H, W) to the same shape.

    `squeeze_excitation` is the ratio of the gate's hidden channels to C (0: no gate); `dropout` acts on the output.
    `chunks` is the number of chunks in which the fused engine recomputes the expanded channels. A chunk consists of
    whole groups of their norm, so `chunks` must divide `norm_groups(expansion * channels)`; ValueError otherwise. The
    module implements `memsave.reversible.RecomputableBranch`.
    """

    layout = torch.channels_last_3d  # in memory a matrix of voxels by channels

    def __init__(
        self,
        channels: int,
        *,
        expansion: int = 4,
        kernel_size: int = 3,
        squeeze_excitation: float = 0.0,
        dropout: float = 0.0,
        chunks: int = 1,
    ):
        super().__init__()
        expanded = channels * expansion
        self.expand = PointwiseConv3d(channels, expanded)
        self.expand_norm = group_norm(expanded)
        self.depthwise = DepthwiseConv3d(expanded, kernel_size=kernel_size)
        self.depthwise_norm = group_norm(expanded)
        self.act = nn.SiLU()
        hidden = max(1, round(channels * squeeze_excitation))
        self.gate = SqueezeExcitation(expanded, hidden=hidden) if squeeze_excitation else nn.Identity()
        self.project = PointwiseConv3d(expanded, channels)
        self.project_norm = group_norm(channels)
        self.dropout = nn.Dropout3d(dropout) if dropout else nn.Identity()
        self.chunks = chunks
        if chunks < 1 or self.expand_norm.num_groups % chunks:
            raise ValueError(
                f"chunks is {chunks}, but the norm of the {expanded} expanded channels has "
                f"{self.expand_norm.num_groups} groups; give a divisor of the number of groups"
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to the same shape."""
        x = self.act(self.expand_norm(self.expand(x)))  # (B, e C, D, H, W)
        x = self.gate(self.act(self.depthwise_norm(self.depthwise(x))))
        return self.dropout(self.project_norm(self.project(x)))  # (B, C, D, H, W)

    def refusal(self) -> str | None:
        """Why this branch cannot be recomputed in chunks, for an error message; None if it can."""
        if type(self).forward is not MBConv3d.forward:
            return f"{type(self).__name__} overrides forward()"
        if isinstance(self.gate, SqueezeExcitation):
            return "its squeeze-excitation reads all expanded channels before it scales the first one"
        for name, (kinds, parameters, options) in PARTS.items():
            part = self.get_submodule(name)
            if type(part) not in kinds:
                return f"its {name} is a {type(part).__name__}"
            if {key for key, tensor in part.named_parameters() if tensor is not None} != parameters:
                return f"its {name} has other parameters than {', '.join(parameters) or 'none'}"
            if any(getattr(part, option) != value for option, value in options.items()):
                return f"its {name} is not a {', '.join(f'{key}={value}' for key, value in options.items())} one"
        if self.depthwise_norm.num_groups % self.chunks:
            return f"{self.chunks} chunks of {self.depthwise_norm.num_groups} groups are not whole groups"
        return None

    def tensors(self) -> list[Tensor]:
        """The parameters, in the order of the gradients of `differentiate`."""
        return chunked.tensors(self)

    def evaluate(self, x: Tensor) -> Tensor:
        """`forward` in chunks, without a graph."""
        return chunked.evaluate(self, x)

    def differentiate(self, x: Tensor, grad: Tensor, *, found: Callable[[Tensor], None]) -> tuple[Tensor, list[Tensor]]:
        """The gradients of sum(grad forward(x)) w.r.t. x and each of `tensors()`; calls `found` with forward(x)."""
        return chunked.differentiate(self, x, grad, found=found)


POINTWISE = {"kernel_size": (1, 1, 1), "stride": (1, 1, 1), "padding": (0, 0, 0), "groups": 1}
PARTS: dict[str, tuple[tuple[type, ...], set[str], dict[str, object]]] = {
    "expand": ((nn.Conv3d, PointwiseConv3d), {"weight"}, POINTWISE),
    "expand_norm": ((nn.GroupNorm, GroupNorm), {"weight", "bias"}, {}),
    "depthwise": ((DepthwiseConv3d,), {"weight"}, {}),
    "depthwise_norm": ((nn.GroupNorm, GroupNorm), {"weight", "bias"}, {}),
    "act": ((nn.SiLU,), set(), {}),
    "gate": ((nn.Identity,), set(), {}),
    "project": ((nn.Conv3d, PointwiseConv3d), {"weight"}, POINTWISE),
    "project_norm": ((nn.GroupNorm, GroupNorm), {"weight", "bias"}, {}),
    "dropout": ((nn.Identity, nn.Dropout3d), set(), {}),
}
"""The parts that `chunks.py` can recompute: allowed types, parameters and options by name."""


def group_norm(channels: int) -> GroupNorm:
    """GroupNorm with up to 8 groups of at least two channels, so that a volume of one voxel has a variance."""
    return GroupNorm(norm_groups(channels), channels)


def norm_groups(channels: int) -> int:
    """The number of groups of `group_norm`."""
    return gcd(NORM_GROUPS, channels // 2) if channels > 1 else 1
