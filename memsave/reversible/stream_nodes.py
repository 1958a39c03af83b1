"""Autograd nodes that keep a stream for backward, and the memory layout of its halves.

Autograd has one thread per device and runs a node in the thread of its output's device. The empty tensors of these
nodes are therefore on the device of the stream: otherwise the CPU's thread would run them at the same time as the
GPU's thread rebuilds the activations.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor

from memsave.reversible.coupling import Stream, memory_format


def keep_tensors(tensors: list[Tensor], *, on_backward: Callable[[], None] | None = None) -> Tensor:
    """Hold tensors as the saved tensors of an autograd node; returns an empty tensor whose grad_fn is that node.

    When backward runs the node, it calls the bound method `on_backward`, to which the node has a weak reference only.
    """
    method = None if on_backward is None else WeakMethod(on_backward)
    return _Keep.apply(method, anchor_like(tensors[0]), *tensors)


def anchor_like(tensor: Tensor) -> Tensor:
    """An empty leaf on the tensor's device: a node that takes it as an input is part of the graph."""
    return torch.empty(0, dtype=torch.float32, device=tensor.device, requires_grad=True)


def kept_tensors(kept: Tensor) -> tuple[Tensor, ...]:
    """The tensors that `keep_tensors` holds; RuntimeError from autograd if one of them was changed in place."""
    return kept.grad_fn.saved_tensors  # type: ignore[union-attr]


def attach_output(output: Tensor, kept: Tensor, stream: Stream) -> Tensor:
    """Make `output` (B, C, ...) a function of the halves of the stream, and of `kept`, whose node then runs next."""
    return _Merge.apply(output, kept, *stream.halves())


class _Keep(torch.autograd.Function):
    """Saves tensors and does not use them."""

    @staticmethod
    def forward(ctx: Any, on_backward: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.on_backward = on_backward
        ctx.save_for_backward(*tensors)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        on_backward = None if ctx.on_backward is None else ctx.on_backward()
        if on_backward is not None:  # None: the context is gone, so no step is left to be rebuilt
            on_backward()
        return (None,) * len(ctx.needs_input_grad)


class _Merge(torch.autograd.Function):
    """The identity on `output`; backward splits its gradient into those of the halves."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, kept: Tensor, target: Tensor, source: Tensor) -> Tensor:
        ctx.dtype, ctx.layout = target.dtype, memory_format(target)
        return output.detach()  # detach() shares the version counter, so in-place changes are still detected

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        halves = grads[0].to(ctx.dtype).chunk(2, dim=1)
        copies = (half.clone(memory_format=ctx.layout) for half in halves)  # a view would hold the whole gradient
        return None, anchor_like(halves[0]).detach(), *copies


def with_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor, copied into memory with these strides unless it has them; unchanged if they are not dense."""
    dims = [
        (size, own, wanted)
        for size, own, wanted in zip(tensor.shape, tensor.stride(), strides, strict=True)
        if size > 1
    ]
    span = 1 + sum((size - 1) * wanted for size, _, wanted in dims)
    if all(own == wanted for _, own, wanted in dims) or not tensor.numel() or span != tensor.numel():
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
