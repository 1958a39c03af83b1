"""`LabelAnswerer`: labels for texts, by a released model of task=classification."""

from collections.abc import Sequence
from typing import Any

import torch

from memsave.data.errors import DataError
from memsave.data.text.tables import Row
from memsave.data.text.templates import Encoded, Text, encode_texts, template_of
from memsave.tasks.language.classifier import classify


class LabelAnswerer:
    """The label of a text, or of a pair, and its probability."""

    gives = ("predicted", "probability")

    def __init__(self, model: Any, tokenizer: Any, *, form: dict[str, Any], device: torch.device):
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.kind, self.labels, self.template = form["objective"], form["labels"], template_of(form)
        self.column, self.pair = form["columns"]["text"], form["columns"].get("pair")
        words = form["label_word_tokens"]
        self.words = None if words is None else torch.tensor(words, device=device)
        self.digest = ""

    def read(self, row: Row) -> Encoded:
        """The tokens of the columns of training, cut as in training."""
        if row.is_plain and self.pair is not None:
            raise DataError(f"{row.where} is one text: give a table with the columns {self.column} and {self.pair}.")
        text, pair = (name and row.text(name) for name in (self.column, self.pair))
        for name, value in ((self.column, text), (self.pair, pair)):
            if value == "":
                raise DataError(f"{row.where} has an empty {name}: fill it in or delete the line.")
        try:
            ([found], _) = encode_texts([Text(text, pair)], self.tokenizer, self.template)
        except DataError as error:
            raise DataError(f"{row.where} cannot be used: {error}") from error
        return found

    def answer(self, inputs: Sequence[Encoded]) -> list[dict[str, Any]]:
        """The most probable label of each text."""
        options: dict[str, Any] = {"kind": self.kind, "words": self.words, "pad": self.tokenizer.pad_token_id}
        probabilities = classify(self.model, inputs, **options, device=self.device)
        chosen = probabilities.argmax(1)
        return [
            {"predicted": self.labels[number], "probability": round(float(each[number]), 6)}
            for number, each in zip(chosen, probabilities, strict=True)
        ]
