"""A 3D U-Net of reversible mobile inverted bottlenecks, after Pendse et al. 2020 (arXiv 2104.09648).

    x -> stem -> [blocks] ------------------------------------- merge -> [blocks] -> head -> logits
                    | down                                        | up
                 [blocks] ------------------------- merge -> [blocks]
                    | down                            | up
                 [blocks] ----------------------------'

[blocks] is a `ReversibleSequence` of additive couplings whose F and G are `MBConv3d` on half of the channels each; all
of the depth is in these sequences. Stem, down, up, merge and head change the number of channels or voxels, so they
cannot be reversible. They are kept cheap: pointwise stem and head, one strided convolution down, a pointwise
convolution at the coarse level followed by trilinear interpolation up.

`memory` only decides what is kept between forward and backward; parameters, function and random numbers do not depend
on it.
"""

import math
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memsave.models.mbconv import MBConv3d, group_norm, norm_groups
from memsave.models.memory import check_memory, run_blocks
from memsave.models.recast import RecastConv3d
from memsave.reversible import AdditiveCoupling, ReversibleSequence
from memsave.reversible.coupling import LOW_PRECISION

SKIPS = ("add", "concat")

Axes = tuple[int, int, int]


class ReversibleUNet3d(nn.Module):
    """Segment volumes (B, in_channels, D, H, W) of any size into logits (B, out_channels, D, H, W).

    Args:
        in_channels, out_channels: of the input and of the logits.
        channels: of the levels, finest first, all even.
        blocks: couplings per level, on the encoder's side and again on the decoder's; one number, or one per level.
        expansion, squeeze_excitation, dropout: see `MBConv3d`.
        skip: "add" or "concat", how a skip connection is merged.
        memory: may be changed at any time. "stored" keeps every activation, "checkpoint" the input of each block,
            "reversible" the output of each level and, with `anchor_every=k`, the input of every k-th block of a level;
            or one of these for each level, finest first.
        anchor_every, grid, engine: see `ReversibleSequence`.
        chunks: the number of chunks in which the fused engine recomputes the branches of the finest level. Coarser
            levels, whose expanded tensors are smaller, use the smallest number for which a chunk is no larger (adjusted
            to a divisor of the groups of their norm).
        deep_supervision: adds a head to each decoder level except the finest; in training the forward also returns the
            logits of these heads.
        strides: by how much each change of level shrinks the volume, a number or one for each axis; None is 2. For
            voxels that are longer in one axis, as in [(1, 2, 2), 2, 2].

    Raises ValueError for arguments that do not define a network.
    """

    config: Any = None
    """The `UNetConfig` of a network that `memsave.load` loaded."""

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 3,
        *,
        channels: Sequence[int] = (16, 32, 64, 128),
        blocks: int | Sequence[int] = 1,
        expansion: int = 4,
        skip: str = "add",
        squeeze_excitation: float = 0.0,
        dropout: float = 0.0,
        memory: str | Sequence[str] = "reversible",
        anchor_every: int | None = None,
        grid: float | None = None,
        engine: str = "auto",
        chunks: int = 4,
        deep_supervision: bool = False,
        strides: Sequence[int | Sequence[int]] | None = None,
    ):
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self._given = given
        depths = _check_levels(channels, blocks, skip)
        if chunks < 1:
            raise ValueError(f"chunks is {chunks}; give at least 1")

        shrink = _check_strides(strides, changes=len(channels) - 1)
        voxels = [math.prod(math.prod(each) for each in shrink[:scale]) for scale in range(len(channels))]

        def level(width: int, depth: int, *, scale: int) -> ReversibleSequence:
            inside: dict[str, Any] = {
                "expansion": expansion,
                "squeeze_excitation": squeeze_excitation,
                "dropout": dropout,
            }
            wanted = chunks * width / (channels[0] * voxels[scale])
            fitting = _divisor(norm_groups(width // 2 * expansion), at_least=wanted)

            def branch() -> MBConv3d:
                return MBConv3d(width // 2, chunks=fitting, **inside)

            blocks = (AdditiveCoupling(branch(), branch()) for _ in range(depth))
            return ReversibleSequence(blocks, anchor_every=anchor_every, grid=grid, engine=engine)

        steps = list(pairwise(channels))  # (finer, coarser) of each change of level
        self.skip = skip
        self.stem = nn.Conv3d(in_channels, channels[0], 1)
        self.encoder = nn.ModuleList(
            level(width, depth, scale=scale) for scale, (width, depth) in enumerate(zip(channels, depths, strict=True))
        )
        self.down = nn.ModuleList(_down(*widths, stride) for widths, stride in zip(steps, shrink, strict=True))
        self.up = nn.ModuleList(RecastConv3d(coarse, fine, 1) for fine, coarse in steps)
        self.join = nn.ModuleList(  # a name in checkpoints
            nn.Conv3d(2 * fine, fine, 1) if skip == "concat" else nn.Identity() for fine, _ in steps
        )
        self.decoder = nn.ModuleList(
            level(fine, depth, scale=scale) for scale, ((fine, _), depth) in enumerate(zip(steps, depths))
        )
        self.head = RecastConv3d(channels[0], out_channels, 1)
        coarse = channels[1:-1] if deep_supervision else ()
        self.side_heads = nn.ModuleList(RecastConv3d(width, out_channels, 1) for width in coarse)
        self.memory = memory

    @property
    def memory(self) -> str | tuple[str, ...]:
        """What is kept between forward and backward: one of `MEMORY_MODES`, or one for each level."""
        return self._memory

    @memory.setter
    def memory(self, mode: str | Sequence[str]) -> None:
        levels = [mode] * len(self.encoder) if isinstance(mode, str) else list(mode)
        if len(levels) != len(self.encoder):
            raise ValueError(f"memory has {len(levels)} entries for {len(self.encoder)} levels; give one per level")
        self._levels = [check_memory(each) for each in levels]
        self._memory: str | tuple[str, ...] = mode if isinstance(mode, str) else tuple(mode)
        for side in (self.encoder, self.decoder):
            for each, blocks in zip(levels, side):
                assert isinstance(blocks, ReversibleSequence)
                blocks.recompute = each == "reversible"
        readers = chain(enumerate(self.down), enumerate((self.head, *self.up)), enumerate(self.side_heads, 1))
        for level, reader in readers:  # of the outputs of each level
            for layer in reader.modules():
                if isinstance(layer, RecastConv3d):
                    layer.input_is_kept = self._levels[level] == "reversible"

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of a network of the same architecture: `ReversibleUNet3d(**network.arguments)`."""
        return {**self._given, "memory": self.memory}

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Map (B, in_channels, D, H, W) to logits (B, out_channels, D, H, W).

        In training with deep supervision returns a list: these logits, then those of each coarser level of the decoder,
        with half the size of the level before.
        """
        logits = self.level_logits(x, coarse=self.training)
        return logits if len(logits) > 1 else logits[0]

    def level_logits(self, x: Tensor, *, coarse: bool) -> list[Tensor]:
        """The logits, and those of the coarser levels if these are asked for and the network has heads for them."""
        x = self.stem(x.contiguous(memory_format=torch.channels_last_3d))
        x = x.contiguous(memory_format=torch.channels_last_3d)
        skips: list[Tensor] = []
        side: list[Tensor] = []
        for level, blocks in enumerate(self.encoder):
            x = run_blocks(blocks, _widened(x), memory=self._levels[level])
            if level < len(self.down):
                skips.append(x)
                x = self.down[level](x)
        for level in reversed(range(len(self.decoder))):
            x = self._upsample(level, x, skips.pop())
            x = run_blocks(self.decoder[level], _widened(x), memory=self._levels[level])
            if coarse and 0 < level <= len(self.side_heads):
                side.insert(0, self.side_heads[level - 1](x))
        return [self.head(x), *side]

    def _upsample(self, level: int, x: Tensor, skip: Tensor) -> Tensor:
        """Upsample x (B, coarser C, D/2, ...) and merge it with the skip (B, C, D, ...): (B, C, D, ...)."""
        x = F.interpolate(self.up[level](x), size=skip.shape[2:], mode="trilinear", align_corners=False)
        return self.join[level](torch.cat((x, skip.to(x.dtype)), dim=1)) if self.skip == "concat" else x + skip


def _widened(x: Tensor) -> Tensor:
    """x in float32, if autocast has computed it in a narrower dtype."""
    return x.float() if torch.is_autocast_enabled(x.device.type) and x.dtype in LOW_PRECISION else x


def _down(fine: int, coarse: int, stride: Axes) -> nn.Sequential:
    """Divide the size of the volume by the stride, rounding up, so that any size is allowed."""
    return nn.Sequential(RecastConv3d(fine, coarse, 3, stride=stride, padding=1, bias=False), group_norm(coarse))


def _divisor(number: int, *, at_least: float) -> int:
    """The smallest divisor of `number` that is at least `at_least`; `number` if there is none."""
    return next((each for each in range(1, number) if number % each == 0 and each >= at_least), number)


def _check_strides(strides: Sequence[int | Sequence[int]] | None, *, changes: int) -> list[Axes]:
    """The stride of each change of level by axis; ValueError for strides that do not define a network."""
    given = [2] * changes if strides is None else list(strides)
    found = [(each,) * 3 if isinstance(each, int) else tuple(each) for each in given]
    if len(found) != changes or any(len(each) != 3 or not {1, 2, 3}.issuperset(each) for each in found):
        raise ValueError(
            f"strides are {given} for {changes + 1} levels; give {changes}, each of 1 to 3 voxels, as one number or as "
            f"three"
        )
    return found  # type: ignore[return-value]


def _check_levels(channels: Sequence[int], blocks: int | Sequence[int], skip: str) -> list[int]:
    """Return the blocks per level; ValueError for arguments that do not define a network."""
    depths = [blocks] * len(channels) if isinstance(blocks, int) else list(blocks)
    odd = [width for width in channels if width < 2 or width % 2]
    if not channels or odd:
        raise ValueError(f"channels are {list(channels)}; each level needs an even number of at least 2")
    if len(depths) != len(channels) or min(depths) < 1:
        raise ValueError(
            f"blocks are {depths} for {len(channels)} levels; give one number of at least 1, or one for each level"
        )
    if skip not in SKIPS:
        raise ValueError(f"skip is {skip!r}; choose one of {', '.join(SKIPS)}")
    return depths
