"""A convolution whose input something keeps anyway: under autocast, its copy in a narrower dtype is made again.

A reversible sequence keeps its output for the backward, in float32. Under autocast the next convolution computes from a
copy of it in bfloat16 or float16, and autograd would keep that, too: half as many bytes again. Here it keeps a
reference to the output, and the backward casts it once more.
"""

import torch
from torch import Tensor, nn

from memsave.reversible.saved_copies import call_on_copy


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
                return call_on_copy(super().forward, x, dtype)
        return super().forward(x)
