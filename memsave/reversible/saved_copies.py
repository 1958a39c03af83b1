"""Calls on a copy in another dtype, for which autograd saves the original: something keeps that anyway."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from memsave.reversible._torch_internals import storage_id, uncompiled, version_of
from memsave.reversible.stream_nodes import keep_tensors, kept_tensors


@uncompiled  # the compiler does not support saved-tensor hooks
def call_on_copy(function: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """function(x in another dtype); the backward makes that copy of x again."""
    narrow = x.to(dtype)
    with saving_wide(x, narrow):
        return function(narrow)


def saving_wide(wide: Tensor, narrow: Tensor) -> saved_tensors_hooks:
    """Context manager: autograd saves `wide` in the place of `narrow`, its copy in another dtype.

    Other saved-tensor hooks (a checkpoint around the layer, offloading) apply to `wide`.
    """
    kept, dtype = keep_tensors([wide.detach()]), narrow.dtype
    place, size, stride = storage_id(narrow), narrow.shape, narrow.stride()  # autograd keeps `pack`, so not `narrow`

    def pack(tensor: Tensor) -> tuple[Tensor, int | None] | None:
        is_narrow = storage_id(tensor) == place and (tensor.shape, tensor.stride()) == (size, stride)
        return None if is_narrow else (tensor.detach(), version_of(tensor))

    def unpack(packed: tuple[Tensor, int | None] | None) -> Tensor:
        if packed is None:
            return kept_tensors(kept)[0].to(dtype)
        tensor, version = packed
        if version_of(tensor) != version:
            raise RuntimeError(
                f"a tensor of shape {tuple(tensor.shape)} was changed in place between forward and backward"
            )
        return tensor

    return saved_tensors_hooks(pack, unpack)
