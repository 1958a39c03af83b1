"""What nnU-Net finds here by name."""

from memsave.integrations.nnunet import nnUNetTrainerMemsave

__all__ = ["nnUNetTrainerMemsave"]
