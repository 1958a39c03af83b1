"""`task=classification`: labels for sentences and pairs of sentences, by one of three objectives.

    head           a new linear layer on an encoder, or on the last token of a causal model
    infilling      a masked language model fills a template with a word for the label, by its own head
    label_words    a causal language model continues a template with a word for the label, by its own head

Infilling is close to pretraining and has no new parameters. Li et al. (2022) found that it makes private fine-tuning
clearly better. The loss of an example is the cross-entropy over the labels. Infilling and label words take a softmax
over the label words alone (Gao et al. 2021).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from memsave.config import Config, ConfigError, option, register
from memsave.data.text.labelled import ClassifiedData
from memsave.data.text.templates import Template
from memsave.progress import Progress
from memsave.tasks.definition import option_of
from memsave.tasks.language.classifier import Classification, Objective, classifier_losses
from memsave.tasks.language.definition import LanguageDefinition, LanguageTaskConfig
from memsave.tasks.language.label_answers import LabelAnswerer
from memsave.tasks.language.pretrained import Purpose
from memsave.training.task import Batch, Task

PURPOSES = {"infilling": "masked", "label_words": "causal"}
WITH_MASKED_HEAD = ("ForMaskedLM", "ForPreTraining")
"""The ends of the names of architectures that have one."""
TEMPLATES: dict[str, tuple[str | None, str | None]] = {  # (for single texts, for pairs)
    "head": (None, None),
    "causal_head": ("{text}", "{text}\n{pair}"),
    "infilling": ("{text} It was {mask}.", "{text}? {mask}, {pair}"),
    "label_words": ("{text} It was {label}", "{text} {pair} Answer: {label}"),
}


@register("task", "classification")
@dataclass
class ClassificationConfig(LanguageTaskConfig):
    """Labels for sentences and pairs of sentences."""

    kind: str = "classification"
    objective: str = option("infilling", choices=("head", "infilling", "label_words"))
    """head: a new layer; infilling: a masked model fills a template; label_words: a causal model continues it."""
    template: str | None = None
    """Such as '{text} It was {mask}.', or '{text} It was {label}'; null takes that of the data set, or one of these."""
    label_words: list[str] | None = None
    """A word of one token for each label, in their order; null takes those of the data set, or the labels' names."""
    positive: str | None = None
    """The label of F1 if there are two, null means the last one; with more labels F1 is the mean over them."""
    evaluate: int = option(5000, least=1)
    """Number of held-out examples for the scores, spread evenly over the held-out file."""

    def definition(self, config: Config) -> "ClassificationDefinition":
        """The definition for a whole config."""
        return ClassificationDefinition(config)

    def answerer(self, model: Any, tokenizer: Any, *, form: dict[str, Any], device: torch.device) -> LabelAnswerer:
        """What memsave.generate asks."""
        return LabelAnswerer(model, tokenizer, form=form, device=device)


class ClassificationDefinition(LanguageDefinition):
    """Labelled texts; see `Classification`."""

    data_class = ClassifiedData

    @property
    def data(self) -> ClassifiedData:
        """The config of the data."""
        return cast(ClassifiedData, self.config.data)

    @property
    def task(self) -> ClassificationConfig:
        """The config of the task."""
        return cast(ClassificationConfig, self.config.task)

    def form(self, *, is_causal: bool = False) -> Template:
        """The template with its length; without template if a new head reads texts as the tokenizer joins them."""
        objective = self.task.objective
        default = TEMPLATES["causal_head" if objective == "head" and is_causal else objective][self.data.has_pairs]
        own = self.data.infilling_template if objective == "infilling" else None
        return Template(self.task.template or own or default, self.data.max_length, objective == "infilling")

    def validate(self) -> None:
        """Raise ConfigError for combinations that cannot run."""
        super().validate()
        if self.task.objective == "head" and "{mask}" in (self.task.template or ""):
            raise ConfigError("{mask} of task.template is not for task.objective=head; give task.template=null")
        form = self.form()
        form.check(has_pairs="{pair}" in (form.template or ""))  # `make_model` compares it with the data
        if self.task.objective == "head" and self.task.label_words is not None:
            raise ConfigError("task.label_words is not for task.objective=head; give task.label_words=null")

    def purpose(self) -> Purpose:
        """The head that the objective needs."""
        if self.task.objective == "head":
            return Purpose("classification", len(self.data.label_names()))
        return Purpose(PURPOSES[self.task.objective])

    def make_model(self, *, progress: Progress) -> tuple[nn.Module, Any]:
        """(the pretrained model, its tokenizer)."""
        self.form().check(has_pairs=self.data.has_pairs)
        purpose, found = self.purpose(), self.model.architecture()
        if not purpose.fits(found):
            raise ConfigError(
                f"task.objective={self.task.objective} needs {purpose.description}, and model="
                f"{option_of('model', self.model)} is a {found.model_type}; give {self._remedy(found)}"
            )
        own = list(found.architectures or ())
        if purpose.kind == "masked" and own and not any(name.endswith(WITH_MASKED_HEAD) for name in own):
            raise ConfigError(
                f"model={option_of('model', self.model)} is a {own[0]}, which holds no pretrained head for masked "
                "tokens; give task.objective=head, or another model"
            )
        return super().make_model(progress=progress)

    def _remedy(self, architecture: Any) -> str:
        """The objectives for which a model of this architecture is made, or another model."""
        kinds = {"head": Purpose("classification", 2), **{key: Purpose(kind) for key, kind in PURPOSES.items()}}
        possible = [key for key, purpose in kinds.items() if purpose.fits(architecture)]
        return f"task.objective={' or '.join(possible)}, or another model" if possible else "another model"

    def make_fake_model(self, *, architecture: Mapping[str, Any] | None = None) -> nn.Module:
        """The model with random weights."""
        changes = dict(architecture or {})
        if self.task.objective == "head" and self.model.architecture().pad_token_id is None:
            changes["pad_token_id"] = 0  # without one, causal models classify only one example at a time
        return super().make_fake_model(architecture=changes)

    def make_task(self, device: torch.device, tokenizer: Any = None, *, progress: Progress) -> Task:
        """The task with its texts."""
        train, held_out = self.data.splits()
        names = self.data.label_names()
        words = None if self.task.objective == "head" else self._words(names)
        if words is not None and len(words) != len(names):
            raise ConfigError(
                f"task.label_words is {list(words)}, but there are {len(names)} labels: {', '.join(names[:10])}; "
                "give one word for each, in this order"
            )
        form = self.form(is_causal=Purpose("causal").fits(self.model.architecture()))
        objective = Objective(self.task.objective, form, tuple(names), words, positive=self._positive(names))
        columns = {key: getattr(self.data, key, key) for key in ("text", *(["pair"] if self.data.has_pairs else []))}
        return Classification(
            train,
            held_out,
            tokenizer,
            objective=objective,
            columns=columns,
            evaluate=self.task.evaluate,
            skipped=self.data.skipped,
            precision=self.config.trainer.precision,
            device=device,
        )

    def _words(self, names: list[str]) -> tuple[str, ...]:
        """The label words: those of the task, or those that the data suggest, or the names of the labels."""
        known = self.data.label_words
        return tuple(self.task.label_words or (known.get(name, name) for name in names))

    def _positive(self, names: list[str]) -> int | None:
        """The number of the label of F1; None for the mean over all labels."""
        chosen = self.task.positive
        if chosen is not None and chosen not in names:
            raise ConfigError(f"task.positive is {chosen!r}; give one of the labels {', '.join(names)}")
        if len(names) == 2:
            return names.index(chosen) if chosen is not None else 1
        return None if chosen is None else names.index(chosen)

    def per_example_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B,) losses: the cross-entropy over the labels; in a plan, the label words are the first tokens."""
        kind, words = self.task.objective, None
        if kind != "head":
            count = len(self.task.label_words or self.data.label_names())
            words = torch.arange(count, device=batch["input_ids"].device)
        return classifier_losses(model, batch, kind=kind, words=words)

    def dummy_batch(self, *, count: int, device: torch.device) -> Batch:
        """Texts of the maximum length."""
        ids = torch.zeros(count, self.data.max_length, dtype=torch.long, device=device)
        zeros = ids[:, 0].clone()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position": zeros, "label": zeros.clone()}

    # memory=auto

    def memory_choices(self, device: torch.device) -> list[list[Config]]:
        """The memory modes of the model, fastest first."""
        modes = [mode for mode in self.config.adapter_modes if mode != "reversible" or self.model.reversible]
        return [[self.config.changed({"memory.mode": mode}) for mode in modes]]

    def describe_memory(self) -> str:
        """Memory mode and micro-batch."""
        memory, size = self.config.memory.mode, self.config.trainer.micro_batch_size
        return f"memory={memory}{self.described_offload} trainer.micro_batch_size={size}{self._described_budget()}"
