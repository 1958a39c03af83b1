"""One parameter's per-example gradients, held in the form that takes the least memory or time.

Where a weight W is used at T positions of an example, its gradient is a sum of T outer products,

    dL_b/dW = sum_t g_bt (x) a_bt ,

with g the output's gradients and a the activations (the inputs) of a linear layer; an embedding's activations are
one-hot. Norms, inner products and weighted sums follow from g and a without the gradients themselves:

    <G, G'>_b = sum_{t,s} <g_bt, g'_bs> <a_bt, a'_bs>        (ghost norm: Goodfellow 2015; Li et al. 2022, section 4)

`FactoredGrad` holds (g, a), `PerSampleGrad` holds the gradients. All arithmetic is in float32 or wider.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from memsave.ghost import _torch_internals as internals


class LazyOutputGrads(Protocol):
    """Output gradients g_bt, (B, T, p), that are not stored and are computed again where they are needed."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, T, p)."""

    @property
    def gram(self) -> Tensor | None:
        """<g_bt, g_bs>, (B, T, T), or None if it is not stored."""

    def pairwise_products(self, other: "Tensor | LazyOutputGrads") -> Tensor:
        """<g_bt, u_bs>, (B, T, S), with vectors u (B, S, p)."""

    def gather(self, index: Tensor) -> Tensor:
        """The entries of g_bt at index (B, S): (B, T, S), zero for a negative index."""

    def per_sample(self, activations: Tensor) -> Tensor:
        """sum_t g_bt (x) a_bt, (B, p, d), for activations (B, T, d)."""

    def matmul(self, values: Tensor) -> Tensor:
        """g_b @ values, (B, T, d), for values (B, p, d)."""

    def add_sum(self, total: Tensor, activations: Tensor) -> None:
        """Add sum_bt g_bt (x) a_bt to `total` (p, d)."""

    def masked(self, mask: Tensor) -> "LazyOutputGrads":
        """A copy that is zero for the examples where `mask` (B,) is False."""


@dataclass(frozen=True)
class PerSampleGrad:
    """The gradients themselves, (B, *shape of the parameter)."""

    values: Tensor
    owns_values: bool = False
    """Whether no other tensor shares the memory; a rule may return an activation's memory, or one tensor twice."""

    def weighted_sum(self, weights: Tensor, *, add_to: Tensor | None = None, overwrite: bool = False) -> Tensor:
        """sum_b weights[b] g_b, in the parameter's shape, added in place to `add_to` if given.

        `overwrite`: the gradients are not needed any more, and the sum may take their memory.
        """
        values = upcast(self.values)
        weights = weights.to(values.dtype)
        if values.shape[0] == 1 and add_to is None and overwrite and self.owns_values:
            return values[0].mul_(weights[0])
        if values.shape[0] == 1 and add_to is not None:
            return add_to.addcmul_(values[0], weights[0])
        total = (values.reshape(values.shape[0], -1).T @ weights).view(values.shape[1:])
        return total if add_to is None else add_to.add_(total)

    def masked(self, mask: Tensor) -> "PerSampleGrad":
        """A copy that is zero for the examples where `mask` (B,) is False, even where they were NaN."""
        return PerSampleGrad(zero_unless(mask, self.values))


@dataclass(frozen=True)
class FactoredGrad:
    """Sums of outer products of output gradients (B, T, p) and activations (B, T, d).

    Integer activations (B, T) are the indices of one-hot vectors of length `num_embeddings`; a negative index is a
    vector of zeros. The gradient has the shape (p, d), or (d, p) when `transposed`, as in layers that store their
    weight that way.
    """

    output_grads: Tensor | LazyOutputGrads
    activations: Tensor
    transposed: bool = False
    num_embeddings: int | None = None
    """d, which the shape of one-hot activations does not contain."""

    @property
    def one_hot(self) -> bool:
        """Whether the activations are indices of one-hot vectors."""
        return not self.activations.is_floating_point()

    @property
    def rows(self) -> "Tensor | LazyOutputGrads":
        """The factor that belongs to the rows of the weight."""
        return self.activations if self.transposed else self.output_grads

    @property
    def columns(self) -> "Tensor | LazyOutputGrads":
        """The factor that belongs to the columns of the weight."""
        return self.output_grads if self.transposed else self.activations

    def sizes(self) -> tuple[int, int, int, int]:
        """(B, T, p, d)."""
        batch, length, p = self.output_grads.shape
        return batch, length, p, self.num_embeddings if self.num_embeddings is not None else self.activations.shape[-1]

    def per_sample(self) -> PerSampleGrad:
        """Form the gradients."""
        if not isinstance(self.output_grads, Tensor):
            values = self.output_grads.per_sample(upcast(self.activations))
            return PerSampleGrad(values.transpose(1, 2) if self.transposed else values, owns_values=True)
        grads = upcast(self.output_grads)
        if self.one_hot:
            batch, _, p, d = self.sizes()
            values = grads.new_zeros(batch, d, p)
            index = self.activations.clamp(min=0).unsqueeze(-1).expand_as(grads)
            values.scatter_add_(1, index, zero_unless(self.activations >= 0, grads))
            return PerSampleGrad(values if self.transposed else values.transpose(1, 2), owns_values=True)
        inputs = upcast(self.activations)
        values = inputs.transpose(1, 2) @ grads if self.transposed else grads.transpose(1, 2) @ inputs
        return PerSampleGrad(values, owns_values=True)

    def weighted_sum(self, weights: Tensor, *, add_to: Tensor | None = None, overwrite: bool = False) -> Tensor:
        """sum_b weights[b] g_b, without the g_b, added in place to `add_to` if given."""
        if self.one_hot:
            return self._weighted_sum_of_one_hot(weights, add_to)
        inputs = upcast(self.activations)
        weights = weights.to(inputs.dtype)[:, None, None]
        if not isinstance(self.output_grads, Tensor):
            _, _, p, d = self.sizes()
            shape = (d, p) if self.transposed else (p, d)
            total = inputs.new_zeros(shape) if add_to is None else add_to
            self.output_grads.add_sum(total.T if self.transposed else total, inputs * weights)
            return total
        grads = upcast(self.output_grads)
        if inputs.shape[-1] <= grads.shape[-1]:  # weigh the smaller factor, because weighing copies it
            inputs = inputs * weights
        else:
            grads = grads * weights
        rows, columns = (inputs, grads) if self.transposed else (grads, inputs)
        rows, columns = rows.flatten(0, 1).T, columns.flatten(0, 1)
        if add_to is None:
            return rows @ columns
        if 1 in add_to.shape:  # cuBLAS refuses a matrix of one row whose rows are apart by less than their length
            return add_to.add_(rows @ columns)
        return add_to.addmm_(rows, columns)

    def _weighted_sum_of_one_hot(self, weights: Tensor, add_to: Tensor | None) -> Tensor:
        assert isinstance(self.output_grads, Tensor)
        grads, (_, _, p, d) = upcast(self.output_grads), self.sizes()
        grads = grads * weights.to(grads.dtype)[:, None, None]
        if add_to is None:
            total = grads.new_zeros(d, p)
        else:
            total = add_to if self.transposed else add_to.T
        index = self.activations
        total.index_add_(0, index.clamp(min=0).flatten(), zero_unless(index >= 0, grads).flatten(0, 1))
        return total if self.transposed else total.T

    def masked(self, mask: Tensor) -> "FactoredGrad":
        """A copy that is zero for the examples where `mask` (B,) is False, even where they were NaN."""
        if isinstance(self.output_grads, Tensor):
            grads: Tensor | LazyOutputGrads = zero_unless(mask, self.output_grads)
        else:
            grads = self.output_grads.masked(mask)
        inputs = self.activations if self.one_hot else zero_unless(mask, self.activations)
        return FactoredGrad(grads, inputs, transposed=self.transposed, num_embeddings=self.num_embeddings)


@dataclass(frozen=True)
class ViewGrad:
    """The gradient of a part of a parameter, such as one expert's slice of stacked weights; the rest has none.

    The parameter is contiguous, and no two elements of the view share memory.
    """

    gradient: PerSampleGrad | FactoredGrad
    """Of the view, (B, *size) when formed."""
    shape: tuple[int, ...]
    """Of the parameter."""
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def geometry(self) -> tuple[Any, ...]:
        """Equal for two views of the same elements in the same order."""
        return self.size, self.stride, self.offset

    def overlaps(self, other: "ViewGrad") -> bool:
        """Whether the two views may share elements."""
        return self.offset <= other.last and other.offset <= self.last

    @property
    def last(self) -> int:
        """The position of the last element in the parameter's memory."""
        return self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))

    def per_sample(self) -> PerSampleGrad:
        """Form the gradients of the whole parameter."""
        part = self.gradient.per_sample() if isinstance(self.gradient, FactoredGrad) else self.gradient
        values = upcast(part.values)
        full = values.new_zeros(len(values), *self.shape)
        full.as_strided((len(values), *self.size), (full[0].numel(), *self.stride), self.offset).copy_(values)
        return PerSampleGrad(full, owns_values=True)

    def weighted_sum(self, weights: Tensor, *, add_to: Tensor | None = None, overwrite: bool = False) -> Tensor:
        """sum_b weights[b] g_b, in the parameter's shape, added in place to `add_to` if given."""
        values = self.gradient.values if isinstance(self.gradient, PerSampleGrad) else self.gradient.activations
        dtype = upcast(values).dtype if values.is_floating_point() else weights.dtype
        total = weights.new_zeros(self.shape, dtype=dtype) if add_to is None else add_to
        if not total.is_contiguous():
            return total.add_(self.weighted_sum(weights))
        part = total.as_strided(self.size, self.stride, total.storage_offset() + self.offset)
        self.gradient.weighted_sum(weights, add_to=part)
        return total

    def masked(self, mask: Tensor) -> "ViewGrad":
        """A copy that is zero for the examples where `mask` (B,) is False, even where they were NaN."""
        return replace(self, gradient=self.gradient.masked(mask))


Gradient = PerSampleGrad | FactoredGrad | ViewGrad


def upcast(tensor: Tensor) -> Tensor:
    """The tensor in float32 or wider."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Context manager: operators run in the dtypes of their inputs; where autocast is off, nothing is entered."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def safe_sqrt(squared: Tensor) -> Tensor:
    """Norms from squared norms that rounding may have made negative; NaN stays NaN."""
    return torch.where(squared < 0, 0.0, squared).sqrt()


def has_values(tensor: Tensor) -> bool:
    """Whether the values can be read; fake tensors and tensors on `meta` have none."""
    return tensor.device.type != "meta" and not internals.is_fake(tensor)


def flatten_positions(tensor: Tensor) -> Tensor:
    """(B, ..., d) to (B, T, d)."""
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])


def zero_unless(mask: Tensor, values: Tensor) -> Tensor:
    """Zero where `mask` (the leading dimensions) is False, before any product, because 0 x NaN is NaN."""
    mask = mask.view(*mask.shape, *[1] * (values.dim() - mask.dim()))
    return torch.where(mask, values, values.new_zeros(()))
