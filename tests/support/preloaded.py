"""Imported once by the server of `tests.support.processes`: what most functions that run in several processes need."""

import nibabel  # noqa: F401
import torch.distributed.fsdp

from memsave.tasks.segmentation import task  # noqa: F401

torch.set_num_threads(1)
