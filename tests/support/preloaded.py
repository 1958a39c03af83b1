"""Imported once by the server of `tests.support.processes`: what most functions that run in several processes need."""

import nibabel  # noqa: F401
import pytest
import torch.distributed.fsdp
from transformers import BartForConditionalGeneration, GPT2ForSequenceClassification, GPT2LMHeadModel  # noqa: F401

import memsave.experiment
import memsave.tasks.language.classification
import memsave.tasks.language.dialog
import memsave.tasks.language.generation
import memsave.tasks.segmentation.task  # noqa: F401
from tests.support.quick import make_quick

make_quick(pytest.MonkeyPatch())
torch.set_num_threads(1)
