"""Models for memory-efficient training: a reversible 3D U-Net, its layers, and the losses of language models."""

from memsave.models.depthwise import depthwise_conv3d
from memsave.models.language import causal_lm_losses
from memsave.models.mbconv import MBConv3d
from memsave.models.model_losses import model_losses
from memsave.models.unet import ReversibleUNet3d

__all__ = ["MBConv3d", "ReversibleUNet3d", "causal_lm_losses", "depthwise_conv3d", "model_losses"]
