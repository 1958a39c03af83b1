"""Sentences from tables: the task behind `data=visits` and `data=e2e`.

One example is one table with its sentence; its loss is the mean over its own target tokens (Li et al. 2022, section 5).
Held out are the perplexity per target token, and BLEU and ROUGE-L of sentences written by beam search.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memsave.config.schema import TrainerConfig
from memsave.data.loader import Index
from memsave.data.text.collate import collate, encode, encode_all, prompt_format, prompts
from memsave.data.text.config import TextData
from memsave.data.text.records import Record, references
from memsave.models.language import IGNORED, causal_lm_losses
from memsave.training.loop import autocast, evaluating
from memsave.training.task import Batch

EVALUATION_BATCH = 32
SHOWN = 8  # tables in samples.md


@dataclass(frozen=True)
class Written:
    """Sentences of one evaluation, by table."""

    texts: dict[str, str]
    scores: dict[str, float]


class TableToText:
    """Records to train on, tables to write about; implements `memsave.training.task.Task`."""

    unit = "one record: a table with its sentence"
    goal = "-perplexity"

    def __init__(
        self,
        train: Sequence[Record],
        held_out: Sequence[Record],
        tokenizer: Any,
        *,
        data: TextData,
        trainer: TrainerConfig,
        device: torch.device,
        head: str = "chunked",
    ):
        self.head = head
        self.tokenizer, self.data, self.device = tokenizer, data, device
        self.precision = trainer.precision
        self.held_out = list(held_out)
        self.tokens, self.cuts = encode_all(train, tokenizer, max_length=data.max_length)
        scored = self.held_out[: data.evaluate]
        self.held_out_tokens, self.held_out_cuts = encode_all(scored, tokenizer, max_length=data.max_length)
        self.evaluations: list[Written] = []

    @property
    def size(self) -> int:
        """Training examples."""
        return len(self.tokens)

    @property
    def fingerprint(self) -> str:
        """A digest of the training tokens."""
        return hashlib.sha256(repr(self.tokens).encode()).hexdigest()[:16]

    @property
    def counts(self) -> dict[str, Any]:
        """Examples, and how many of them and of their tokens are cut; of held-out records those that are scored."""
        tables = len(references(self.held_out))
        held_out = {"records": len(self.held_out), "tables": tables, "written_tables": min(tables, self.data.generate)}
        return {**asdict(self.cuts), "held_out": {**held_out, **asdict(self.held_out_cuts)}}

    def describe_counts(self) -> str:
        """The same in one line."""
        length, held_out = self.data.max_length, self.counts["held_out"]
        return (
            f"training examples: {self.size}, {self.cuts.describe(max_length=length)}; held-out records: "
            f"{held_out['records']}, of which {held_out['examples']} are scored (data.evaluate), "
            f"{self.held_out_cuts.describe(max_length=length)}; of {held_out['tables']} held-out tables "
            f"{held_out['written_tables']} are written about (data.generate)"
        )

    def load(self, indices: Sequence[Index]) -> Batch:
        """The examples of these indices, in this order, on the CPU: input_ids, attention_mask, labels, (B, T) each."""
        return collate([self.tokens[each.example] for each in indices], pad=self.tokenizer.pad_token_id)

    def place(self, batch: Batch) -> Batch:
        """The batch on the device."""
        return {key: value.to(self.device) for key, value in batch.items()}

    def per_example_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B,): each the mean cross-entropy over its own target tokens."""
        return text_losses(model, batch, head=self.head)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Perplexity per held-out target token, BLEU (0 to 100) and ROUGE-L (0 to 1) over the first tables."""
        from memsave.data.text.metrics import text_scores

        known = references(self.held_out)
        texts = self.write(model, list(known)[: self.data.generate])
        scores = {
            "perplexity": self.perplexity(model),
            **text_scores(list(texts.values()), [known[table] for table in texts]),
        }
        self.evaluations.append(Written(texts, scores))
        return scores

    def perplexity(self, model: nn.Module) -> float:
        """exp of the mean cross-entropy over the target tokens of the first held-out records."""
        total, count, held_out = 0.0, 0, self.held_out_tokens
        with evaluating(model), autocast(model, self.precision):
            for first in range(0, len(held_out), EVALUATION_BATCH):
                part = collate(held_out[first : first + EVALUATION_BATCH], pad=self.tokenizer.pad_token_id)
                batch = {key: value.to(self.device) for key, value in part.items()}
                targets = (batch["labels"] != IGNORED).sum(1)
                total += (self.per_example_losses(model, batch) * targets).sum().item()
                count += int(targets.sum())
        return math.exp(min(total / count, 50.0))

    def write(self, model: Any, tables: Sequence[str]) -> dict[str, str]:
        """A sentence for each table, by beam search."""
        written: dict[str, str] = {}
        with evaluating(model), autocast(model, self.precision):
            for first in range(0, len(tables), EVALUATION_BATCH):
                part = tables[first : first + EVALUATION_BATCH]
                tokens = [
                    encode(Record(table, ""), self.tokenizer, max_length=self.data.max_length)[0] for table in part
                ]
                batch = prompts(tokens, pad=self.tokenizer.pad_token_id)
                length = batch["input_ids"].shape[1]
                out = model.generate(
                    **{key: value.to(self.device) for key, value in batch.items()},
                    num_beams=self.data.beams,
                    do_sample=False,
                    max_new_tokens=max(1, self.data.max_length - length),
                    eos_token_id=self.tokenizer.eos_token_id,
                    pad_token_id=self.tokenizer.pad_token_id,
                )
                texts = self.tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
                written.update(zip(part, (text.strip() for text in texts), strict=True))
        return written

    def show(self, folder: Path) -> list[Path]:
        """Tables of the last evaluation with what was written about them, at first and at last, as `samples.md`."""
        path = folder / "samples.md"
        known, first, last = references(self.held_out), self.evaluations[0], self.evaluations[-1]
        lines = ["# Sentences written for tables that were held out", ""]
        for table in list(last.texts)[:SHOWN]:
            lines += [f"**{table}**", ""]
            if first is not last:
                lines.append(f"- before: {first.texts[table]}")
            lines += [f"- after: {last.texts[table]}", f"- a person's: {known[table][0]}", ""]
        path.write_text("\n".join(lines))
        return [path]

    def release(self, model: Any, folder: Path) -> None:
        """Write what may be handed on: weights, config and tokenizer, for `from_pretrained(folder)`, and the prompt."""
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        prompt = prompt_format(self.tokenizer, max_length=self.data.max_length, beams=self.data.beams)
        (folder / "prompt.json").write_text(json.dumps(prompt, indent=2) + "\n")

    def summary(self, scores: dict[str, float]) -> str:
        """The scores, before and after."""
        first = self.evaluations[0].scores
        named = {"perplexity": "perplexity", "bleu": "BLEU", "rouge_l": "ROUGE-L"}
        each = (
            f"{name} {scores[key]:.2f}" + (f" (before: {first[key]:.2f})" if first is not scores else "")
            for key, name in named.items()
        )
        return f"On held-out records: {', '.join(each)}"


def text_losses(model: nn.Module, batch: Batch, *, head: str = "chunked") -> Tensor:
    """(B,) losses of input_ids, attention_mask and labels, (B, T) each."""
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
    return causal_lm_losses(model, ids, labels, attention_mask=mask, head=head)


def dummy_batch(data: TextData, *, count: int, device: torch.device) -> Batch:
    """A batch of the greatest length, with nothing in it, in which every token is a target."""
    ids = torch.zeros(count, data.max_length, dtype=torch.long, device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros_like(ids)}
