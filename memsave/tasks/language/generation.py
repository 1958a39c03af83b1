"""`task=generation`: texts for prompts, such as sentences for tables, and whole documents.

An example is a prompt with its completion, or a document; its loss is the mean over its target tokens (Li et al. 2022,
section 5). The scores on held-out records are the perplexity per target token, and BLEU and ROUGE-L of texts generated
by beam search. An encoder-decoder reads the prompt with its encoder. Documents are in `documents.py`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from memsave.config import Config, ConfigError, option, register
from memsave.config.schema import TrainerConfig
from memsave.data.fingerprint import fingerprint_of
from memsave.data.text.collate import IGNORED, Example
from memsave.data.text.config import RecordsData, WritingData
from memsave.data.text.documents import DocumentsData
from memsave.data.text.encode import Cuts, encode_prompt, encode_records, prompt_format
from memsave.data.text.pairs import collate_pairs, cut_input, encode_pairs, input_tokens, pair_format
from memsave.data.text.records import Record, references
from memsave.data.text.splits import raw_data
from memsave.models.encoder_decoder import encoder_decoder_losses, is_encoder_decoder
from memsave.progress import Progress
from memsave.tasks.definition import option_of
from memsave.tasks.language.answering import TextAnswerer
from memsave.tasks.language.definition import SMALL_CHUNKS, LanguageDefinition, LanguageTaskConfig
from memsave.tasks.language.documents import Documents
from memsave.tasks.language.pretrained import Purpose
from memsave.tasks.language.task import dummy_batch, text_losses
from memsave.tasks.language.writing import Evaluation, WritingTask
from memsave.training.task import Batch, Task


@register("task", "generation")
@dataclass
class GenerationConfig(LanguageTaskConfig):
    """Texts for prompts: sentences for tables, or completions of one's own records and documents."""

    kind: str = "generation"
    generate: int = option(64, least=1)
    """Number of held-out prompts for which texts are generated, for BLEU, ROUGE-L and samples.md."""
    beams: int = option(4, least=1)
    """Width of the beam search."""
    prompt_tokens: int = option(16, least=1)
    """data=documents: tokens of a held-out document from which samples.md continues it."""

    def definition(self, config: Config) -> "GenerationDefinition":
        """The definition for a whole config."""
        return GenerationDefinition(config)

    def answerer(self, model: Any, tokenizer: Any, *, form: dict[str, Any], device: torch.device) -> TextAnswerer:
        """What memsave.generate asks."""
        return TextAnswerer(model, tokenizer, form=form, device=device)


class GenerationDefinition(LanguageDefinition):
    """Prompts and completions, or documents; see `Generation`, `PairGeneration` and `Documents`."""

    data_class = WritingData

    @property
    def task(self) -> GenerationConfig:
        """The config of the task."""
        return cast(GenerationConfig, self.config.task)

    @property
    def rows(self) -> int:
        """The largest number of rows of an example."""
        return (self.data.max_chunks or 1) if isinstance(self.data, DocumentsData) else 1

    def validate(self) -> None:
        """Raise ConfigError for documents without a largest size where one is needed."""
        super().validate()
        if not isinstance(self.data, DocumentsData) or self.data.max_chunks is not None:
            return
        config = self.config
        needing = {"mode=plan": config.mode == "plan", f"vary={config.vary}": config.vary is not None}
        needing["memory=auto"] = config.memory.mode == "auto"
        key = next((key for key, found in needing.items() if found), None)
        if key is not None:
            raise ConfigError(
                f"data.max_chunks is null, so documents have no largest size, which {key} needs; give the largest "
                f"number of chunks of data.max_length tokens, as in data.max_chunks=8"
            )

    def purpose(self) -> Purpose:
        """Writing text, after a prompt or from an encoder. Raises ConfigError for documents with an encoder-decoder."""
        found = super().purpose()
        if found.kind == "encoder_decoder" and isinstance(self.data, DocumentsData):
            raise ConfigError(
                f"data=documents has no prompts, which the encoder of model={option_of('model', self.model)} "
                f"({self.model.name}) reads; give a causal model such as model=gpt2, or data=records"
            )
        return found

    def make_task(self, device: torch.device, tokenizer: Any = None, *, progress: Progress) -> Task:
        """The task with its data."""
        train, held_out = self.data.splits()
        own: dict[str, Any] = {"trainer": self.config.trainer, "head": self.model.head, "device": device}
        if isinstance(self.data, DocumentsData):
            asked = {key: value for key, value in asdict(self.task).items() if key != "kind"}
            return Documents(train, held_out, tokenizer, data=self.data, **asked, **own)
        kind = PairGeneration if self.purpose().kind == "encoder_decoder" else Generation
        return kind(train, held_out, tokenizer, data=cast(RecordsData, self.data), task=self.task, **own)

    def per_example_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B,) losses: the mean cross-entropy over the target tokens of each example."""
        losses = pair_losses if is_encoder_decoder(model) else text_losses
        return losses(model, batch, head=self.model.head)

    def dummy_batch(self, *, count: int, device: torch.device) -> Batch:
        """Examples of the maximum length in which every token is a target."""
        found = dummy_batch(count=count, rows=self.rows, length=self.data.max_length, device=device)
        if self.purpose().kind == "encoder_decoder":
            found["encoder_mask"] = found.pop("attention_mask")
        return found

    def fixed_sizes(self) -> list[str]:
        """Tokens of an example, and chunks of a document."""
        return [*super().fixed_sizes(), *([f"{self.rows} chunks"] if self.rows > 1 else [])]

    def small_config(self) -> tuple[Config, dict[str, Any]]:
        """Two short examples; documents have two chunks."""
        config, architecture = super().small_config()
        if self.rows > SMALL_CHUNKS:
            config = config.changed({"data.max_chunks": SMALL_CHUNKS})
        return config, architecture


class Generation(WritingTask):
    """Training records and held-out records; implements `memsave.training.task.Task`."""

    unit = "one record: a prompt with its completion"
    names: ClassVar = {"perplexity": "perplexity", "bleu": "BLEU", "rouge_l": "ROUGE-L"}
    title = "Generated texts for held-out prompts"
    source = "held-out records"

    def __init__(
        self,
        train: Sequence[Record],
        held_out: Sequence[Record],
        tokenizer: Any,
        *,
        data: RecordsData,
        task: GenerationConfig | None = None,
        trainer: TrainerConfig,
        device: torch.device,
        head: str = "chunked",
    ):
        self.data, self.task = data, task or GenerationConfig()
        self.held_out, self.data_fingerprint = list(held_out), fingerprint_of(raw_data(train, held_out))
        self.record_units = [each.unit for each in train]
        self.tokenizer, self.completions = tokenizer, references(self.held_out)
        self.format: dict[str, Any] = {"max_length": data.max_length, "separator": data.separator}
        examples, self.cuts = self.encode(train)
        scored, self.held_out_cuts = self.encode(self.held_out[: self.task.evaluate])
        own: dict[str, Any] = {"beams": self.task.beams, "max_length": data.max_length}
        precision = trainer.precision
        super().__init__(examples, scored, tokenizer, precision=precision, device=device, head=head, **own)

    def encode(self, records: Sequence[Record]) -> tuple[list[Example], Cuts]:
        """(the tokens of the records, the counts of cut tokens)."""
        return encode_records(records, self.tokenizer, **self.format)

    def encode_prompt(self, prompt: str) -> list[int]:
        """The tokens of a prompt."""
        return encode_prompt(prompt, self.tokenizer, **self.format)

    def reference(self, prompt: str) -> str:
        """The first completion of a held-out prompt."""
        return self.completions[prompt][0]

    @property
    def counts(self) -> dict[str, Any]:
        """Numbers of examples, cut examples and cut tokens, for training records and scored held-out records."""
        prompts = len(self.completions)
        written = min(prompts, self.task.generate)
        held_out = {"records": len(self.held_out), "prompts": prompts, "written_prompts": written}
        return {**asdict(self.cuts), "held_out": {**held_out, **asdict(self.held_out_cuts)}}

    def describe_counts(self) -> str:
        """The counts in one line."""
        length, held_out = self.data.max_length, self.counts["held_out"]
        return (
            f"training examples: {self.size}, {self.cuts.describe(max_length=length)}; held-out records: "
            f"{held_out['records']}, of which {held_out['examples']} are scored (task.evaluate), "
            f"{self.held_out_cuts.describe(max_length=length)}; held-out prompts: {held_out['prompts']}, of which "
            f"{held_out['written_prompts']} get generated texts (task.generate)"
        )

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Perplexity per held-out target token, and BLEU (0 to 100) and ROUGE-L (0 to 1) of the first prompts."""
        from memsave.data.text.metrics import text_scores

        texts = self.write(model, list(self.completions)[: self.task.generate])
        scores = {
            "perplexity": self.perplexity(model),
            **text_scores(list(texts.values()), [self.completions[prompt] for prompt in texts]),
        }
        self.evaluations.append(Evaluation(texts, scores))
        return scores

    def prompt_format(self) -> dict[str, Any]:
        """The content of `prompt.json`; its `template` makes a prompt from the columns of one's own records."""
        template = getattr(self.data, "prompt", None)
        return {**prompt_format(self.tokenizer, beams=self.task.beams, **self.format), "template": template}


class PairGeneration(Generation):
    """Records for an encoder-decoder: the encoder reads the prompt, the decoder writes the completion."""

    def encode(self, records: Sequence[Record]) -> tuple[list[Example], Cuts]:
        """(the tokens of the records, the counts of cut tokens)."""
        return encode_pairs(records, self.tokenizer, max_length=self.data.max_length)

    def encode_prompt(self, prompt: str) -> list[int]:
        """The tokens of a prompt."""
        return cut_input(input_tokens(prompt, self.tokenizer), max_length=self.data.max_length)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """The batch of some examples; see `collate_pairs`."""
        return collate_pairs(examples, pad=self.tokenizer.pad_token_id)

    def count_tokens(self, batch: Batch) -> int:
        """The tokens of a batch without padding, of both sides."""
        return int(batch["encoder_mask"].sum()) + int(self.count_targets(batch).sum())

    def count_targets(self, batch: Batch) -> Tensor:
        """(B,): the number of targets of each example."""
        return (batch["labels"] != IGNORED).sum(1)

    def per_example_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B,) losses: the mean cross-entropy over the target tokens of each example."""
        return pair_losses(model, batch, head=self.head)

    def prompt_format(self) -> dict[str, Any]:
        """The content of `prompt.json`."""
        return pair_format(self.tokenizer, max_length=self.data.max_length, beams=self.task.beams)


def pair_losses(model: nn.Module, batch: Batch, *, head: str = "chunked") -> Tensor:
    """(B,) losses of a batch of `collate_pairs`."""
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["encoder_mask"]
    return encoder_decoder_losses(model, ids, labels, attention_mask=mask, head=head)
