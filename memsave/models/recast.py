"""A convolution whose input something keeps anyway: under autocast, its copy in a narrower dtype is made again.

A reversible sequence keeps its output for the backward, in float32. Under autocast the next convolution computes from a
copy of it in bfloat16 or float16, and autograd would keep that, too: half as many bytes again. Here it keeps a
reference to the output, and the backward casts it once more.
"""

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from memsave.reversible._torch_internals import storage_id, uncompiled, version_of
from memsave.reversible.stream_nodes import keep_tensors, kept_tensors


class RecastConv3d(nn.Conv3d):
    """`nn.Conv3d` with padding by zeros: the same function and gradients.

    `input_is_kept` says whether something keeps the input until the backward anyway; only then it is cast again.
    """

    input_is_kept = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to (B, out_channels, ...)."""
        kind = x.device.type
        saves_input = self.weight.requires_grad and torch.is_grad_enabled() and not x.is_inference()
        if self.input_is_kept and saves_input and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            if x.dtype == torch.float32 != dtype:
                return self._cast_again(x, dtype)
        return super().forward(x)

    @uncompiled  # the compiler does not support saved-tensor hooks
    def _cast_again(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        narrow = x.to(dtype)
        with saving_wide(x, narrow):
            return super().forward(narrow)


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
