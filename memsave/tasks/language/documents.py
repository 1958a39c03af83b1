"""Whole documents: the task of `task=generation data=documents`.

An example is a document; its loss is the mean over all its tokens, in all its chunks. The score on held-out documents
is the perplexity per token. BLEU is no score here, because many continuations of a text are good.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from memsave.config.schema import TrainerConfig
from memsave.data.fingerprint import fingerprint_of
from memsave.data.text.collate import token_ids
from memsave.data.text.documents import Document, DocumentsData, document_start, encode_documents
from memsave.data.text.splits import raw_data
from memsave.tasks.language.writing import Evaluation, WritingTask


class Documents(WritingTask):
    """Training documents and held-out documents; implements `memsave.training.task.Task`.

    Args:
        generate: held-out documents that are continued, for samples.md.
        prompt_tokens: tokens of a document from which it is continued.
    """

    unit = "one document"
    names: ClassVar = {"perplexity": "perplexity"}
    title = "Continuations of held-out documents"
    source = "held-out documents"

    def __init__(
        self,
        train: Sequence[Document],
        held_out: Sequence[Document],
        tokenizer: Any,
        *,
        data: DocumentsData,
        evaluate: int = 500,
        generate: int = 64,
        prompt_tokens: int = 16,
        beams: int = 4,
        trainer: TrainerConfig,
        device: torch.device,
        head: str = "chunked",
    ):
        self.data, self.held_out_count = data, len(held_out)
        self.data_fingerprint = fingerprint_of(each.text for each in raw_data(train, held_out))
        self.record_units = [each.unit for each in train]
        options: dict[str, Any] = {"max_length": data.max_length, "max_chunks": data.max_chunks}
        examples, self.cuts = encode_documents(train, tokenizer, **options)
        scored, self.held_out_cuts = encode_documents(held_out[:evaluate], tokenizer, **options)
        self.starts = _starts([each.text for each in held_out[:generate]], tokenizer, count=prompt_tokens)
        own: dict[str, Any] = {"beams": beams, "max_length": data.max_length}
        precision = trainer.precision
        super().__init__(examples, scored, tokenizer, precision=precision, device=device, head=head, **own)

    @property
    def counts(self) -> dict[str, Any]:
        """Numbers of documents, chunks and cut tokens, for training documents and scored held-out documents."""
        held_out = {"documents": self.held_out_count, "continued": len(self.starts), **self.held_out_cuts.as_dict()}
        return {**self.cuts.as_dict(), "held_out": held_out}

    def describe_counts(self) -> str:
        """The counts in one line."""
        length = self.data.max_length
        return (
            f"training documents: {self.size}, {self.cuts.describe(max_length=length)}; held-out documents: "
            f"{self.held_out_count}, of which {self.held_out_cuts.examples} are scored (task.evaluate), "
            f"{self.held_out_cuts.describe(max_length=length)}; {len(self.starts)} are continued (task.generate)"
        )

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Perplexity per token of the held-out documents; also continues the first ones."""
        scores = {"perplexity": self.perplexity(model)}
        self.evaluations.append(Evaluation(self.write(model, list(self.starts)), scores))
        return scores

    def encode_prompt(self, prompt: str) -> list[int]:
        """The token with which every document starts, and the tokens of the prompt."""
        found = [document_start(self.tokenizer), *token_ids(prompt, self.tokenizer)]
        return found[: self.max_length - 1]

    def reference(self, prompt: str) -> str:
        """How the held-out document continues."""
        return self.starts[prompt]

    def prompt_format(self) -> dict[str, Any]:
        """The content of `prompt.json`."""
        start, end = self.tokenizer.decode([document_start(self.tokenizer)]), self.tokenizer.eos_token
        return {
            "task": "generation",
            "prompt": f"{start}{{prompt}}",
            "completion": f"{{completion}}{end}",
            "separator": "",
            "add_special_tokens": False,
            "max_prompt_tokens": self.max_length - 2,
            "generate": {
                "max_length": self.max_length,
                "num_beams": self.beams,
                "do_sample": False,
                "eos_token_id": self.tokenizer.eos_token_id,
                "pad_token_id": self.tokenizer.pad_token_id,
            },
        }


def _starts(texts: Sequence[str], tokenizer: Any, *, count: int) -> dict[str, str]:
    """The continuation of each start of at most `count` tokens; of equal starts, only the first text's."""
    found: dict[str, str] = {}
    for text in texts:
        tokens = token_ids(text, tokenizer)
        start = tokenizer.decode(tokens[:count])
        found.setdefault(start, tokenizer.decode(tokens[count : 4 * count]))
    return found
