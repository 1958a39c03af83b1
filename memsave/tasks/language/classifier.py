"""`Classification`: labelled texts as a task of the training loop, and the labels that a model gives to texts."""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memsave.data.fingerprint import fingerprint_of
from memsave.data.loader import Index
from memsave.data.text.collate import in_batches
from memsave.data.text.label_metrics import confusion_matrix, label_scores
from memsave.data.text.labelled import Labelled
from memsave.data.text.splits import raw_data
from memsave.data.text.templates import Encoded, Template, Text, collate_texts, encode_texts, label_word_tokens
from memsave.models.label_words import label_word_logits
from memsave.models.padding import positions
from memsave.processes import map_shares
from memsave.tasks.language.confusion import draw_confusion
from memsave.tasks.language.task import LanguageTask
from memsave.training.loop import autocast, evaluating
from memsave.training.task import Batch

BATCH = 64
WRONG, RIGHT = 12, 4  # examples in samples.md
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Objective:
    """How a model gives a label to a text."""

    kind: str
    """head, infilling or label_words."""
    form: Template
    labels: tuple[str, ...]
    """The names of the labels."""
    words: tuple[str, ...] | None = None
    """The label words; None for a head of its own."""
    positive: int | None = None
    """The label of F1; None for the mean over all labels."""


def classifier_logits(model: nn.Module, batch: Batch, *, kind: str, words: Tensor | None) -> Tensor:
    """(B, L): the logits of the labels of a batch of `collate_texts`.

    Args:
        model: a model with the head that the objective needs.
        batch: input_ids and attention_mask (B, T), position (B,).
        kind: head, infilling or label_words.
        words: (L,) tokens of the label words; None for head.
    """
    inputs = {key: batch[key] for key in INPUTS if key in batch}
    if words is None:
        logits: Tensor = model(**inputs).logits
        return logits
    if kind == "label_words":
        positions(model, inputs["input_ids"], inputs["attention_mask"])  # checks that padding changes no logits
    return label_word_logits(model, inputs, position=batch["position"], words=words)


def classifier_losses(model: nn.Module, batch: Batch, *, kind: str, words: Tensor | None) -> Tensor:
    """(B,): the cross-entropy over the labels; see `classifier_logits`."""
    logits = classifier_logits(model, batch, kind=kind, words=words)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return F.cross_entropy(logits, batch["label"], reduction="none")


def classify(
    model: nn.Module,
    texts: Sequence[Encoded],
    *,
    kind: str,
    words: Tensor | None,
    pad: int,
    precision: str = "float32",
    device: torch.device,
    shared: bool = False,
) -> np.ndarray:
    """(N, L): the probability of each label for each text. Texts of similar length share a batch.

    With `shared`, each process of the group computes a share of the batches, and gets all results.
    """

    def probabilities(part: Sequence[int]) -> np.ndarray:
        """Those of the texts with these numbers."""
        batch = collate_texts([texts[number] for number in part], pad=pad)
        placed = {key: value.to(device) for key, value in batch.items()}
        return classifier_logits(model, placed, kind=kind, words=words).float().softmax(1).cpu().numpy()

    order = sorted(range(len(texts)), key=lambda number: len(texts[number].ids))
    batches = in_batches(order, BATCH)
    with evaluating(model), autocast(model, precision):
        found = map_shares(probabilities, batches) if shared else list(map(probabilities, batches))
    return np.concatenate(found)[np.argsort(order)]


@dataclass(frozen=True)
class Evaluation:
    """The probabilities (N, L) of one evaluation, its confusion matrix (L, L) and its scores."""

    probabilities: np.ndarray
    confusion: np.ndarray
    scores: dict[str, float]


class Classification(LanguageTask):
    """Training and held-out texts with labels; implements `memsave.training.task.Task`.

    Args:
        train, held_out: the labelled texts.
        tokenizer: of the model.
        objective: how a text becomes tokens, and tokens a label.
        columns: the names of the columns of text and pair, for `prompt.json`.
        evaluate: as task.evaluate.
        skipped: the number of lines of the files that were left out.
        precision: of the evaluation, as trainer.precision.
        device: of the model.
    """

    unit = "one labelled text"
    goal = "accuracy"

    def __init__(
        self,
        train: Sequence[Labelled],
        held_out: Sequence[Labelled],
        tokenizer: Any,
        *,
        objective: Objective,
        columns: Mapping[str, str] | None = None,
        evaluate: int = 5000,
        skipped: int = 0,
        precision: str = "float32",
        device: torch.device,
    ):
        self.objective, self.columns, self.skipped = objective, dict(columns or {"text": "text"}), skipped
        self.held_out, self.held_out_size = spread(held_out, evaluate), len(held_out)
        form = objective.form
        self.words = None
        if objective.words is not None:
            self.words = torch.tensor(label_word_tokens(objective.words, tokenizer, form), device=device)
        encoded, self.cuts = encode_texts([Text(each.text, each.pair) for each in train], tokenizer, form)
        self.labels, self.record_units = [each.label for each in train], [each.unit for each in train]
        self.data_fingerprint = fingerprint_of(raw_data(train, held_out))
        scored = [Text(each.text, each.pair) for each in self.held_out]
        self.held_out_texts, self.held_out_cuts = encode_texts(scored, tokenizer, form)
        examples: Any = list(zip(encoded, self.labels, strict=True))
        super().__init__(examples, [], tokenizer, precision=precision, device=device)
        self.evaluations: list[Evaluation] = []

    @property
    def counts(self) -> dict[str, Any]:
        """Numbers of examples, by label, cut and left out, for training and scored held-out texts."""
        held_out = {"texts": self.held_out_size, **self._by_label([each.label for each in self.held_out])}
        return {
            **_cut_counts(self.cuts),
            **self._by_label(self.labels),
            "skipped_lines": self.skipped,
            "held_out": {**held_out, **_cut_counts(self.held_out_cuts)},
        }

    def _by_label(self, labels: Sequence[int]) -> dict[str, Any]:
        counts = Counter(labels)
        return {"labels": {name: counts[number] for number, name in enumerate(self.objective.labels)}}

    def describe_counts(self) -> str:
        """The counts in one line."""
        length, counts = self.objective.form.max_length, self.counts
        labels = ", ".join(f"{name} {count}" for name, count in list(counts["labels"].items())[:10])
        skipped = f"; {self.skipped} invalid lines of the files are skipped" if self.skipped else ""
        return (
            f"training texts: {self.size} ({labels}), {self.cuts.describe(max_length=length)}; held-out texts: "
            f"{self.held_out_size}, of which {len(self.held_out)} are scored (task.evaluate), "
            f"{self.held_out_cuts.describe(max_length=length)}{skipped}"
        )

    def load(self, indices: Sequence[Index]) -> Batch:
        """The texts of these indices on the CPU, with their labels (B,); see `collate_texts`."""
        examples: list[Any] = [self.examples[each.example] for each in indices]
        batch = collate_texts([text for text, _ in examples], pad=self.tokenizer.pad_token_id)
        return {**batch, "label": torch.tensor([label for _, label in examples], dtype=torch.long)}

    def add_canaries(self, count: int, *, seed: int) -> None:
        """Append copies of examples with a wrong label, at random."""
        chance, labels = random.Random(seed), range(len(self.objective.labels))
        copied: list[Any] = [self.examples[number % len(self.examples)] for number in range(count)]
        wrong: Any = [(text, chance.choice([each for each in labels if each != label])) for text, label in copied]
        self.examples += wrong

    def per_example_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B,): the cross-entropy over the labels."""
        return classifier_losses(model, batch, kind=self.objective.kind, words=self.words)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Accuracy, F1 and MCC with the ends of their intervals, and the mean cross-entropy of the held-out texts."""
        probabilities = classify(
            model,
            self.held_out_texts,
            kind=self.objective.kind,
            words=self.words,
            pad=self.tokenizer.pad_token_id,
            precision=self.precision,
            device=self.device,
            shared=True,
        )
        labels = [each.label for each in self.held_out]
        confusion = confusion_matrix(labels, probabilities.argmax(1).tolist(), count=len(self.objective.labels))
        own = probabilities[np.arange(len(labels)), labels]
        scores = label_scores(confusion, positive=self.objective.positive)
        scores["cross_entropy"] = float(-np.log(np.maximum(own, 1e-30)).mean())
        self.evaluations.append(Evaluation(probabilities, confusion, scores))
        return scores

    def show(self, folder: Path) -> list[Path]:
        """Write `confusion.png` and `samples.md` of the last evaluation, the picture also of the first one."""
        first, last = self.evaluations[0], self.evaluations[-1]
        both = {"before training": first, "after training": last} if first is not last else {"held-out texts": last}
        titles = {f"{title}: accuracy {each.scores['accuracy']:.3f}": each.confusion for title, each in both.items()}
        paths = [folder / "confusion.png", folder / "samples.md"]
        draw_confusion(titles, self.objective.labels, paths[0])
        paths[1].write_text("\n".join(self._samples(last.probabilities)), encoding="utf-8")
        return paths

    def _samples(self, probabilities: np.ndarray) -> Iterator[str]:
        """The lines of `samples.md`: wrong predictions, the most confident first, and some right ones."""
        names, predicted = self.objective.labels, probabilities.argmax(1)
        wrong = [n for n, each in enumerate(self.held_out) if predicted[n] != each.label]
        right = [n for n, each in enumerate(self.held_out) if predicted[n] == each.label]
        confident = sorted(wrong, key=lambda n: -probabilities[n].max())
        yield f"# Predictions for {len(self.held_out)} held-out texts, of which {len(wrong)} are wrong"
        for title, chosen in (("Wrong", confident[:WRONG]), ("Right", spread(right, RIGHT))):
            yield from ("", f"## {title}", "") if chosen else ()
            for n in chosen:
                each = self.held_out[n]
                text = " ".join(each.text.split())
                second = "" if each.pair is None else f" / {' '.join(each.pair.split())}"
                yield (
                    f"- {text}{second}  \n  label: **{names[each.label]}**, predicted: **{names[predicted[n]]}** "
                    f"with probability {probabilities[n].max():.2f}"
                )
        yield ""

    def prompt_format(self) -> dict[str, Any]:
        """The content of `prompt.json`: everything that turns texts into labels."""
        chosen = self.objective
        return {
            "task": "classification",
            "objective": chosen.kind,
            **asdict(chosen.form),
            "columns": self.columns,
            "labels": list(chosen.labels),
            "label_words": None if chosen.words is None else list(chosen.words),
            "label_word_tokens": None if self.words is None else self.words.tolist(),
            "padding_side": "right",
        }

    def release(self, model: Any, folder: Path) -> None:
        """Write weights, config with the names of the labels, tokenizer and `prompt.json`."""
        model.config.id2label = dict(enumerate(self.objective.labels))
        model.config.label2id = {name: number for number, name in enumerate(self.objective.labels)}
        super().release(model, folder)

    def summary(self, scores: dict[str, float]) -> str:
        """The scores in one line, with their intervals, and with those before training if there are any."""
        first = self.evaluations[0].scores
        several = len(self.objective.labels) > 2 and self.objective.positive is None
        names = {"accuracy": "accuracy", "f1": "macro F1" if several else "F1", "mcc": "MCC"}
        each = (
            f"{name} {scores[key]:.3f} [{scores[f'{key}_low']:.3f}, {scores[f'{key}_high']:.3f}]"
            + (f" (before: {first[key]:.3f})" if first is not scores else "")
            for key, name in names.items()
        )
        return f"On {len(self.held_out)} held-out texts, with 95% intervals: {', '.join(each)}"


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, at even distances: files are often sorted by label."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def _cut_counts(cuts: Any) -> dict[str, int]:
    return {key: getattr(cuts, key) for key in ("examples", "cut_examples", "cut_tokens")}
