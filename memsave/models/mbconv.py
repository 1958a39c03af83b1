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
    `chunks`, which may be changed at any time and changes the function by rounding alone, is the number of chunks that
    the expanded channels are recomputed in, where they are: a divisor of the groups of their norm (8 and e C / 2 have
    their greatest common divisor of groups). It implements `memsave.reversible.RecomputableBranch`.
    """

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
                f"chunks is {chunks}, but the {wide} expanded channels have {self.expand_norm.num_groups} groups, "
                f"which a chunk must not divide; give a divisor of that"
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to the same shape."""
        x = self.act(self.expand_norm(self.expand(x)))  # (B, e C, D, H, W)
        x = self.gate(self.act(self.depthwise_norm(self.depthwise(x))))
        return self.dropout(self.project_norm(self.project(x)))  # (B, C, D, H, W)


    def refusal(self) -> str | None:
        """Why this branch cannot be recomputed in chunks; None if it can."""
        if isinstance(self.gate, SqueezeExcitation):
            return "its squeeze-excitation reads all expanded channels before the first of them is scaled"
        for name, kind in PARTS.items():
            if type(self.get_submodule(name)) not in kind:
                return f"its {name} is a {type(self.get_submodule(name)).__name__}"
        if type(self).forward is not MBConv3d.forward:
            return f"{type(self).__name__} has a forward of its own"
        return None

    def tensors(self) -> list[Tensor]:
        """What `differentiate` gives gradients of, besides x."""
        return chunked.tensors(self)

    def evaluate(self, x: Tensor) -> Tensor:
        """`forward` without a graph, in chunks."""
        return chunked.evaluate(self, x)

    def differentiate(
        self, x: Tensor, grad: Tensor, *, found: Callable[[Tensor], None]
    ) -> tuple[Tensor, list[Tensor]]:
        """The gradients of sum(grad forward(x)) by x and by each of `tensors()`; `found` is given forward(x)."""
        return chunked.differentiate(self, x, grad, found=found)


PARTS: dict[str, tuple[type, ...]] = {
    "expand": (nn.Conv3d,),
    "expand_norm": (nn.GroupNorm,),
    "depthwise": (DepthwiseConv3d,),
    "depthwise_norm": (nn.GroupNorm,),
    "act": (nn.SiLU,),
    "gate": (nn.Identity,),
    "project": (nn.Conv3d,),
    "project_norm": (nn.GroupNorm,),
    "dropout": (nn.Identity, nn.Dropout3d),
}
"""What `chunks.py` knows how to recompute."""


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm, which needs no batch, with up to 8 groups of at least two channels, so that one voxel is enough."""
    groups = gcd(NORM_GROUPS, channels // 2) if channels > 1 else 1
    return nn.GroupNorm(groups, channels)
