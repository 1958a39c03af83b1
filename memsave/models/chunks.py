"""Evaluate and differentiate an MBConv branch over chunks of its expanded channels.

    a = GN(W x)    s = SiLU(a)    d = depthwise(s)    u = GN(d)    t = SiLU(u)    p = sum over chunks V t    F = GN(p)

Only one chunk of s and d exists at a time. A GroupNorm is an affine map u = scale d + shift per channel, whose
coefficients are functions of the first two moments of its input. A chunk consists of whole groups, so its coefficients
can be computed from the chunk alone. Those of a can be computed from the moments of x, because W is linear:

    mean(W x) = W mean(x)        var(W x) = diag(W cov(x) W')

so W and its norm are one affine map of x, and a is written once. Backward reverses this: large tensors appear only in
contractions and affine maps, and autograd differentiates the coefficients, which are small, in float64. The last norm
needs the whole p. Therefore all chunks are evaluated first, and each once more for its gradients, except the last one,
whose tensors still exist.

Of a chunk, only s, d and their gradients are whole tensors, because the convolution reads neighbours. All else is
computed in blocks of voxels (`blockwise.py`), and again in the backward.

Tensors are matrices of voxels by channels, (B, V, C): the memory layout of a channels_last_3d tensor.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memsave.models import blockwise
from memsave.models.blockwise import accumulation_dtype
from memsave.models.depthwise import depthwise_gradients, same_depthwise_conv

LAST = torch.channels_last_3d


class Affine(NamedTuple):
    """The affine map of a GroupNorm, per sample and channel: x -> scale x + shift."""

    scale: Tensor
    shift: Tensor


def evaluate(block: Any, x: Tensor) -> Tensor:
    """The value of an `MBConv3d` at x; both (B, C, D, H, W)."""
    dtype = _compute_dtype(x)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        branch = ChunkedBranch(block, x, dtype=dtype)
        projected = branch.projected()
        value, _, _ = _finish(block, projected, x.shape)
        return _volume(value, x.shape)


def differentiate(
    block: Any, x: Tensor, grad: Tensor, *, found: Callable[[Tensor], None]
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of sum(grad F(x)) w.r.t. x and each of `tensors(block)`; calls `found` with F(x)."""
    dtype = _compute_dtype(x)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        branch = ChunkedBranch(block, x, dtype=dtype)
        projected = branch.projected(keep_last=True)
        value, norm, mask = _finish(block, projected, x.shape, into=torch.empty_like(projected))
        found(_volume(value, x.shape))
        del value
        upstream = _rows(grad, grad.dtype)
        upstream = upstream if mask is None else upstream * mask.to(grad.dtype)
        moments = blockwise.moments(upstream, projected)
        by_projected, by_norm = norm.gradients(upstream, projected, over=projected, moments=moments)
        by_projected = by_projected.to(dtype)  # the wider one is freed
        del projected, upstream
        by_x, inner = branch.gradients(by_projected)
        return _volume(by_x, x.shape).to(x.dtype), _like(tensors(block), [*inner, *by_norm])


def tensors(block: Any) -> list[Tensor]:
    """The parameters of an `MBConv3d`, in the order of the gradients."""
    return [
        block.expand.weight,
        block.expand_norm.weight,
        block.expand_norm.bias,
        block.depthwise.weight,
        block.depthwise_norm.weight,
        block.depthwise_norm.bias,
        block.project.weight,
        block.project_norm.weight,
        block.project_norm.bias,
    ]


class ChunkedBranch:
    """One call of a branch: x, the coefficients of its chunks, and the buffers that all chunks share."""

    def __init__(self, block: Any, x: Tensor, *, dtype: torch.dtype):
        self.block, self.dtype, self.shape = block, dtype, x.shape
        self.x = _rows(x, dtype)  # (B, V, C)
        self.expanded_channels = block.depthwise.out_channels
        self.width = self.expanded_channels // block.chunks
        self.first = FoldedNorm(block.expand, block.expand_norm, self.x)
        self.norms: dict[int, Norm] = {}  # the second norm, by chunk
        self.buffers: dict[str, Tensor] = {}
        self.kept: tuple[int, Tensor] | None = None  # a chunk, and its d; its s is in the buffers

    def part(self, chunk: int) -> slice:
        """The slice of the expanded channels that belongs to a chunk."""
        return slice(chunk * self.width, (chunk + 1) * self.width)

    def projected(self, *, keep_last: bool = False) -> Tensor:
        """p (B, V, C), summed in float32 or wider; `keep_last` keeps s and d of the last chunk."""
        total = self.x.new_empty(self.x.shape, dtype=accumulation_dtype(self.dtype))
        for chunk in range(self.block.chunks):
            filtered = self._filtered(chunk)
            blockwise.project(filtered, *self.norms[chunk].affine, self._projection(chunk), total, chunk > 0)
            if keep_last and chunk == self.block.chunks - 1:
                self.kept = chunk, filtered
            del filtered  # before the next chunk allocates
        if not keep_last:
            self.buffers.clear()
        return total

    def gradients(self, upstream: Tensor) -> tuple[Tensor, list[Tensor]]:
        """From dL/dp: the gradients of x (B, V, C) and of the parameters up to the projection."""
        by_x = torch.empty_like(upstream, dtype=accumulation_dtype(self.dtype))
        first, second = self.first.zeros(), by_x.new_zeros(2, self.expanded_channels, dtype=torch.float64)
        filters, projection = [], []
        for done, chunk in enumerate(reversed(range(self.block.chunks))):
            part = self.part(chunk)
            by_projection, by_squashed, by_filter, second[:, part] = self._filter_gradients(chunk, upstream)
            projection.append(by_projection)
            filters.append(by_filter)
            by_first = blockwise.expand_backward(
                by_squashed, self.x, self.first.weight[:, part], self.first.shift[:, part], by_x, done > 0
            )
            first.weight[:, part], first.shift[:, part] = by_first[..., :-1], by_first[..., -1]
            del by_squashed  # before the next chunk allocates
        self.buffers.clear()
        by_weight, by_scale, by_shift, by_mean, by_covariance = self.first.gradients(first)
        self.first.add_moments(by_x, self.x, by_mean, by_covariance)
        rest = [torch.cat(filters[::-1]), *second, torch.cat(projection[::-1], dim=1)]
        return by_x, [by_weight, by_scale, by_shift, *rest]

    def _filter_gradients(self, chunk: int, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From dL/dp: the gradients of the projection, of s (B, V, width), of the depthwise kernel and of the norm."""
        kept, filtered = self.kept or (-1, self.x)
        self.kept = None
        if kept != chunk:
            filtered = self._filtered(chunk)
        norm, by_normed = self.norms[chunk], self._buffer("gradient")
        by_projection, moments = blockwise.project_backward(
            upstream, filtered, *norm.affine, self._projection(chunk), by_normed
        )
        by_filtered, by_norm = norm.gradients(by_normed, filtered, over=by_normed, moments=moments)
        del filtered  # before the convolution allocates
        by_squashed, by_filter = depthwise_gradients(
            _volume(self._buffer("squashed"), self.shape), self._filter(chunk), _volume(by_filtered, self.shape)
        )
        return by_projection, _rows(by_squashed, self.dtype), by_filter, torch.stack(by_norm)

    def _filtered(self, chunk: int) -> Tensor:
        """d of a chunk; its s is in the buffer."""
        part, squashed = self.part(chunk), self._buffer("squashed")
        blockwise.expand(self.x, self.first.weight[:, part], self.first.shift[:, part], squashed)
        filtered = _rows(same_depthwise_conv(_volume(squashed, self.shape), self._filter(chunk)), self.dtype)
        if chunk not in self.norms:
            self.norms[chunk] = Norm(self.block.depthwise_norm, filtered, part)
        return filtered

    def _buffer(self, name: str) -> Tensor:
        if name not in self.buffers:
            self.buffers[name] = self.x.new_empty(*self.x.shape[:2], self.width)
        return self.buffers[name]

    def _filter(self, chunk: int) -> Tensor:
        return self.block.depthwise.weight[self.part(chunk)].to(self.dtype)  # (width, 1, k, k, k)

    def _projection(self, chunk: int) -> Tensor:
        return self.block.project.weight[:, self.part(chunk)].flatten(1).to(self.dtype)  # (C, width)


class Norm:
    """A GroupNorm, or a part of it with whole groups, with the moments of a tensor (B, V, C)."""

    def __init__(self, norm: nn.GroupNorm, x: Tensor, part: slice = slice(None)):
        self.voxels = x.shape[1]
        mean, square = blockwise.moments(x, x) / self.voxels  # (B, C)
        self.leaves = [each.detach().double() for each in (mean, square, *_of(norm, part))]
        self.groups = norm.num_groups * x.shape[2] // norm.num_channels
        self.eps = norm.eps
        self.affine = self._affine()

    def _affine(self) -> Affine:
        return group_norm_affine(*self.leaves, groups=self.groups, eps=self.eps)

    def apply(self, x: Tensor, *, out: Tensor) -> Tensor:
        """scale x + shift."""
        scale, shift = (each[:, None].to(x.dtype) for each in self.affine)
        return torch.addcmul(shift, x, scale, out=out)

    def gradients(self, grad: Tensor, x: Tensor, *, over: Tensor, moments: Tensor) -> tuple[Tensor, list[Tensor]]:
        """dL/dx, written to `over` (`grad` or x), and the gradients of weight and bias; `moments`: of grad and x."""
        by_shift, by_scale = moments
        with torch.enable_grad():
            for leaf in self.leaves:
                leaf.requires_grad_()
            by_mean, by_square, *parameters = torch.autograd.grad(self._affine(), self.leaves, (by_scale, by_shift))
        of_grad, of_x, shift = self.affine.scale, 2 * by_square / self.voxels, by_mean / self.voxels
        (factor, other, by) = (of_grad, x, of_x) if over is grad else (of_x, grad, of_grad)
        blockwise.add_scaled(over, factor, other, by, shift)
        return over, parameters


class FoldedNorm:
    """A pointwise convolution and its norm as one affine map of x (B, V, C), from the moments of x."""

    def __init__(self, conv: nn.Conv3d, norm: nn.GroupNorm, x: Tensor):
        self.voxels, self.groups, self.eps = x.shape[1], norm.num_groups, norm.eps
        self.mean = blockwise.sums(x) / self.voxels  # (B, C)
        covariance = blockwise.covariance(x, self.mean)
        weight = conv.weight.flatten(1)
        self.leaves = [each.detach().double() for each in (weight, *_of(norm), self.mean, covariance)]
        self.weight, self.shift = self._fold()

    def _fold(self) -> Affine:
        """The weight (B, E, C) and shift (B, E)."""
        weight, gain, bias, mean, covariance = self.leaves
        means = mean @ weight.t()  # (B, E)
        squares = (weight @ covariance * weight).sum(-1) + means.square()
        scale, shift = group_norm_affine(means, squares, gain, bias, groups=self.groups, eps=self.eps)
        return Affine(scale[..., None] * weight, shift)

    def zeros(self) -> "FoldedGradients":
        """Zero gradients, which the chunks fill in."""
        return FoldedGradients(torch.zeros_like(self.weight), torch.zeros_like(self.shift))

    def gradients(self, by: "FoldedGradients") -> tuple[Tensor, ...]:
        """Of the convolution's weight (E, C), the norm's weight and bias (E,), and the mean and covariance of x."""
        with torch.enable_grad():
            for leaf in self.leaves:
                leaf.requires_grad_()
            return torch.autograd.grad(self._fold(), self.leaves, tuple(by))

    def add_moments(self, by_x: Tensor, x: Tensor, by_mean: Tensor, by_covariance: Tensor) -> None:
        """Add to dL/dx the gradients through the mean and the covariance."""
        slope = 2 * by_covariance / self.voxels  # (B, C, C), symmetric like the covariance
        shift = by_mean / self.voxels - (self.mean[:, None] @ slope).squeeze(1)  # (B, C)
        blockwise.add_linear(by_x, x, slope, shift)


class FoldedGradients(NamedTuple):
    """The gradients of a `FoldedNorm`'s weight and shift."""

    weight: Tensor
    shift: Tensor


def group_norm_affine(mean: Tensor, square: Tensor, weight: Tensor, bias: Tensor, *, groups: int, eps: float) -> Affine:
    """The affine map of GroupNorm for a tensor with these channel means and mean squares, both (B, C)."""
    means, squares = (each.unflatten(1, (groups, -1)) for each in (mean, square))
    weights, biases = (each.unflatten(0, (groups, -1)) for each in (weight, bias))
    centre = means.mean(2, keepdim=True)  # (B, G, 1)
    variance = (squares.mean(2, keepdim=True) - centre.square()).clamp(min=0)
    scale = (variance + eps).rsqrt() * weights
    return Affine(scale.flatten(1), (biases - scale * centre).flatten(1))


def _finish(
    block: Any, projected: Tensor, shape: torch.Size, *, into: Tensor | None = None
) -> tuple[Tensor, Norm, Tensor | None]:
    """(F, its norm, the dropout's mask (B, 1, C)) from p."""
    norm = Norm(block.project_norm, projected)
    value = norm.apply(projected, out=projected if into is None else into)
    if isinstance(block.dropout, nn.Identity) or not block.dropout.training:
        return value, norm, None
    mask = block.dropout(value.new_ones(*shape[:2], 1, 1, 1)).flatten(2).transpose(1, 2)  # drops whole channels
    return value.mul_(mask), norm, mask


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of convolutions: that of autocast, if it is enabled and casts x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x.dtype


def _rows(volume: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, C, D, H, W) as (B, V, C): a view if it is channels_last_3d and of this dtype."""
    return volume.to(dtype).contiguous(memory_format=LAST).permute(0, 2, 3, 4, 1).flatten(1, 3)


def _volume(rows: Tensor, shape: torch.Size) -> Tensor:
    """(B, V, C) as (B, C, D, H, W) in channels_last_3d."""
    if rows.shape[1] == 1:  # with other strides, a float64 convolution of PyTorch 2.11 on CUDA reads foreign memory
        return rows.reshape(-1, rows.shape[2], 1, 1, 1)
    return rows.unflatten(1, tuple(shape[2:])).permute(0, 4, 1, 2, 3)


def _of(norm: nn.GroupNorm, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
    return norm.weight[part], norm.bias[part]


def _like(parameters: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    return [each.to(p.dtype).view_as(p) for p, each in zip(parameters, gradients, strict=True)]
