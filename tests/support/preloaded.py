"""Imported once by the server of `tests.support.processes`: what most functions that run in several processes need."""

import torch.distributed.fsdp
import transformers  # noqa: F401

import memsave.privacy  # noqa: F401
from memsave.models import unet  # noqa: F401

torch.set_num_threads(1)
