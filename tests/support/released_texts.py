"""A tiny model of task=generation on five records, as a run releases it."""

import torch

from memsave.config.schema import TrainerConfig
from memsave.data.text.records import Record
from memsave.data.text.visits import private_records
from memsave.tasks.language.generation import Generation, GenerationConfig
from memsave.tasks.language.small_gpt2 import SmallGPT2, small_gpt2, train_tokenizer

SIZES = SmallGPT2(layers=2, heads=2, width=16, vocabulary=400, positions=120)
KNOWN = {"trainer": TrainerConfig(), "device": torch.device("cpu")}
PEOPLE = [("Ada", 36), ("Bob", 41), ("Cy", 7), ("Dee", 55), ("Eve", 23)]
PROMPT = "{name} ({age}):"


def tokenizer_of():
    return train_tokenizer([each.completion for each in private_records(50)], size=SIZES.vocabulary)


def model_of(tokenizer, *, seed=0):
    """A model with weights so large that its texts differ between prompts."""
    model = small_gpt2(SmallGPT2(**{**vars(SIZES), "seed": seed}), tokenizer)
    with torch.no_grad():
        for each in model.parameters():
            each.mul_(8)
    return model.eval()


def task_of(data, tokenizer):
    train = [Record(f"{name} ({age}):", f"{name} came.") for name, age in PEOPLE]
    return Generation(train, train, tokenizer, data=data, task=GenerationConfig(beams=2), **KNOWN)
