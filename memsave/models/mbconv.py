"""Mobile inverted bottlenecks in 3D, the branches of the reversible U-Net.

    expand      1x1x1 convolution      C -> e C        GroupNorm, SiLU
    filter      depthwise 3x3x3        e C -> e C      GroupNorm, SiLU, squeeze-excitation (optional)
    project     1x1x1 convolution      e C -> C        GroupNorm, no activation (a linear bottleneck)

Sandler et al., "MobileNetV2" (2018); squeeze-excitation as in Howard et al., "MobileNetV3" (2019). The expanded tensors
are what fills a GPU when they are stored: about 37 times the block's input for a coupling of two branches with e = 6.

A branch also knows how to recompute itself over chunks of its expanded channels (`chunks.py`), which a
`ReversibleSequence` makes use of: then no more than a chunk of them ever exists.
"""

from collections.abc import Callable
from math import gcd

import torch
from torch import Tensor, nn

from memsave.models import chunks as chunked
from memsave.models.depthwise import depthwise_conv3d

NORM_GROUPS = 8


class DepthwiseConv3d(nn.Conv3d):
    """`nn.Conv3d(channels, channels, kernel_size, groups=channels, padding="same")`, run by `depthwise_conv3d`."""

    def __init__(self, channels: int, *, kernel_size: int = 3, bias: bool = False):
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}; it must be odd, so that the volume keeps its size")
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to the same shape."""
        return depthwise_conv3d(x, self.weight, self.bias)


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate read from all channels' means (Hu et al. 2018)."""

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
    """An inverted bottleneck without a residual of its own: (B, C, D, H, W) to the same shape.

    `squeeze_excitation` is the ratio of the gate's hidden channels to C (0: no gate); `dropout` acts on the output.
    `chunks` is the number of chunks in which the expanded channels are recomputed, where they are; a chunk holds whole
    groups of their norm, so it divides `norm_groups(expansion * channels)`. It implements
    `memsave.reversible.RecomputableBranch`.
    """

    layout = torch.channels_last_3d  # in which it works on voxels by channels

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
        wide = channels * expansion
        self.expand = nn.Conv3d(channels, wide, 1, bias=False)
        self.expand_norm = group_norm(wide)
        self.depthwise = DepthwiseConv3d(wide, kernel_size=kernel_size)
        self.depthwise_norm = group_norm(wide)
        self.act = nn.SiLU()
        hidden = max(1, round(channels * squeeze_excitation))
        self.gate = SqueezeExcitation(wide, hidden=hidden) if squeeze_excitation else nn.Identity()
        self.project = nn.Conv3d(wide, channels, 1, bias=False)
        self.project_norm = group_norm(channels)
        self.dropout = nn.Dropout3d(dropout) if dropout else nn.Identity()
        self.chunks = chunks
        if chunks < 1 or self.expand_norm.num_groups % chunks:
            raise ValueError(
                f"chunks is {chunks}, but the norm of the {wide} expanded channels has {self.expand_norm.num_groups} "
                f"groups, which a chunk holds whole; give a divisor of that"
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to the same shape."""
        x = self.act(self.expand_norm(self.expand(x)))  # (B, e C, D, H, W)
        x = self.gate(self.act(self.depthwise_norm(self.depthwise(x))))
        return self.dropout(self.project_norm(self.project(x)))  # (B, C, D, H, W)

    def refusal(self) -> str | None:
        """Why this branch cannot be recomputed in chunks; None if it can."""
        if type(self).forward is not MBConv3d.forward:
            return f"{type(self).__name__} has a forward of its own"
        if isinstance(self.gate, SqueezeExcitation):
            return "its squeeze-excitation reads all expanded channels before the first of them is scaled"
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
        """What `differentiate` gives gradients of, besides x."""
        return chunked.tensors(self)

    def evaluate(self, x: Tensor) -> Tensor:
        """`forward` without a graph, in chunks."""
        return chunked.evaluate(self, x)

    def differentiate(self, x: Tensor, grad: Tensor, *, found: Callable[[Tensor], None]) -> tuple[Tensor, list[Tensor]]:
        """The gradients of sum(grad forward(x)) by x and by each of `tensors()`; `found` is given forward(x)."""
        return chunked.differentiate(self, x, grad, found=found)


POINTWISE = {"kernel_size": (1, 1, 1), "stride": (1, 1, 1), "padding": (0, 0, 0), "groups": 1}
PARTS: dict[str, tuple[tuple[type, ...], set[str], dict[str, object]]] = {
    "expand": ((nn.Conv3d,), {"weight"}, POINTWISE),
    "expand_norm": ((nn.GroupNorm,), {"weight", "bias"}, {}),
    "depthwise": ((DepthwiseConv3d,), {"weight"}, {}),
    "depthwise_norm": ((nn.GroupNorm,), {"weight", "bias"}, {}),
    "act": ((nn.SiLU,), set(), {}),
    "gate": ((nn.Identity,), set(), {}),
    "project": ((nn.Conv3d,), {"weight"}, POINTWISE),
    "project_norm": ((nn.GroupNorm,), {"weight", "bias"}, {}),
    "dropout": ((nn.Identity, nn.Dropout3d), set(), {}),
}
"""What `chunks.py` knows how to recompute: by part its kinds, parameters and options."""


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm, which needs no batch, with up to 8 groups of at least two channels, so that one voxel is enough."""
    return nn.GroupNorm(norm_groups(channels), channels)


def norm_groups(channels: int) -> int:
    """The groups of `group_norm`."""
    return gcd(NORM_GROUPS, channels // 2) if channels > 1 else 1
