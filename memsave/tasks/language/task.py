"""`LanguageTask`: what the language tasks have in common. An example is one or several rows of tokens."""

import hashlib
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memsave.data.loader import Index
from memsave.data.text.collate import IGNORED, Example, Tokens, collate, in_batches
from memsave.models.language import causal_lm_losses
from memsave.processes import map_shares
from memsave.tasks.language.adapter_files import save_model
from memsave.training.loop import autocast, evaluating
from memsave.training.task import Batch, placed

EVALUATION_BATCH = 32


class LanguageTask:
    """Training and held-out examples as tokens; the base of the tasks with a causal model.

    A subclass encodes its examples, and implements `evaluate`, `show`, `summary`, `counts`, `describe_counts` and
    `prompt_format`.

    Args:
        examples: the training examples.
        held_out: the held-out examples for the perplexity.
        tokenizer: of the model.
        precision: of the evaluation, as trainer.precision.
        device: of the model.
        head: as model.head.
    """

    unit: str
    goal: str = "-perplexity"

    def __init__(
        self,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        tokenizer: Any,
        *,
        precision: str,
        device: torch.device,
        head: str = "chunked",
    ):
        self.examples, self.held_out_examples, self.tokenizer = list(examples), list(held_out), tokenizer
        self.precision, self.device, self.head = precision, device, head

    @property
    def size(self) -> int:
        """Number of training examples."""
        return len(self.examples)

    @property
    def fingerprint(self) -> str:
        """A digest of the training tokens."""
        return hashlib.sha256(repr(self.examples).encode()).hexdigest()[:16]

    def load(self, indices: Sequence[Index]) -> Batch:
        """The examples of these indices on the CPU; see `collate`."""
        return self.collate([self.examples[each.example] for each in indices])

    def collate(self, examples: Sequence[Example]) -> Batch:
        """The batch of some examples."""
        return collate(examples, pad=self.tokenizer.pad_token_id)

    def add_canaries(self, count: int, *, seed: int) -> None:
        """Append copies of examples whose targets are random tokens of the training examples."""
        chance = random.Random(seed)
        words = sorted({token for example in self.examples for row in example for token in row.ids})
        copied = [self.examples[number % len(self.examples)] for number in range(count)]
        self.examples += [[_scrambled(row, words, chance) for row in example] for example in copied]

    def count_targets(self, batch: Batch) -> Tensor:
        """(B,): the number of targets of each example."""
        return (batch["labels"][..., 1:] != IGNORED).flatten(1).sum(1)

    def count_tokens(self, batch: Batch) -> int:
        """The tokens of a batch without padding."""
        return int(batch["attention_mask"].sum())

    def place(self, batch: Batch) -> Batch:
        """The batch on the device."""
        return placed(batch, self.device)

    def per_example_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B,) losses: the mean cross-entropy over the target tokens of each example."""
        return text_losses(model, batch, head=self.head)

    def perplexity(self, model: nn.Module) -> float:
        """exp(mean cross-entropy) over the target tokens of the held-out examples, whose batches processes share."""

        def sums(part: Sequence[Example]) -> tuple[float, int]:
            """(sum of the losses of the target tokens of a batch, their number)."""
            batch = self.place(self.collate(part))
            targets = self.count_targets(batch)
            return (self.per_example_losses(model, batch) * targets).sum().item(), int(targets.sum())

        held_out = [[row] for example in self.held_out_examples for row in example]  # long examples take less memory
        with evaluating(model), autocast(model, self.precision):
            found = map_shares(sums, in_batches(held_out, EVALUATION_BATCH))
        total, count = sum(loss for loss, _ in found), sum(targets for _, targets in found)
        return math.exp(min(total / count, 50.0)) if count else math.nan

    def prompt_format(self) -> dict[str, Any]:
        """The content of `prompt.json` in `model/`: how inputs become tokens, for scripts and memsave.generate."""
        raise NotImplementedError

    def release(self, model: Any, folder: Path) -> None:
        """Write weights, config and tokenizer for `from_pretrained(folder)`, and the format of the prompt."""
        save_model(model, folder)
        self.tokenizer.save_pretrained(folder)
        (folder / "prompt.json").write_text(json.dumps(self.prompt_format(), indent=2) + "\n")


def _scrambled(row: Tokens, words: Sequence[int], chance: random.Random) -> Tokens:
    """The row with random tokens as targets."""
    ids = [token if label == IGNORED else chance.choice(words) for token, label in zip(*row, strict=True)]
    return Tokens(ids, [IGNORED if label == IGNORED else token for token, label in zip(ids, row.labels, strict=True)])


def text_losses(model: nn.Module, batch: Batch, *, head: str = "chunked") -> Tensor:
    """(B,) losses of a batch of `collate`, with input_ids, attention_mask and labels."""
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
    return causal_lm_losses(model, ids, labels, attention_mask=mask, head=head)


def dummy_batch(*, count: int, rows: int = 1, length: int, device: torch.device) -> Batch:
    """A batch of zeros of the maximum length in which every token is a target; see `collate`."""
    shape = (count, length) if rows == 1 else (count, rows, length)
    ids = torch.zeros(shape, dtype=torch.long, device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros_like(ids)}
