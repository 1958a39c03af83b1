"""Reversible models, and the layers that make them fast."""

from memsave.models.depthwise import depthwise_conv3d
from memsave.models.mbconv import MBConv3d
from memsave.models.unet import ReversibleUNet3d

__all__ = ["MBConv3d", "ReversibleUNet3d", "depthwise_conv3d"]
