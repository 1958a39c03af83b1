"""Answers of a released language model: what `python -m memsave.generate` asks of a task.

`model/` holds `prompt.json`, which says how an input becomes tokens. The config class of the task makes the `Answerer`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from memsave.config import ConfigError
from memsave.config.registry import component, names
from memsave.data.errors import DataError
from memsave.data.text.own_records import Template
from memsave.data.text.pairs import input_tokens
from memsave.data.text.tables import Row
from memsave.files import parse_json
from memsave.tasks.language.decoding import write_texts
from memsave.tasks.language.pretrained import usable_positions
from memsave.tasks.loading import load_model

PROMPT = "prompt.json"

MOST_BEAMS = 1024


class Answerer(Protocol):
    """A trained model with the format of its inputs."""

    digest: str
    """Identifies the model."""
    column: str
    """The column of an input of plain lines."""
    gives: Sequence[str]
    """The columns of an answer."""

    def read(self, row: Row) -> Any:
        """The input of a row. Raises DataError, which names the line, if it cannot be used."""

    def answer(self, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """The answers to a batch of inputs, by column."""


class TextAnswerer:
    """Texts for prompts, by a model of task=generation."""

    column = "prompt"
    gives = ("generated",)

    def __init__(self, model: Any, tokenizer: Any, *, form: dict[str, Any], device: torch.device):
        self.model, self.tokenizer, self.form, self.device = model, tokenizer, form, device
        self.template = Template(form["template"], key="data.prompt") if form.get("template") else None
        self.is_pair = form.get("model") == "encoder_decoder"
        self.digest = ""
        options, positions = form["generate"], None if self.is_pair else usable_positions(model.config)
        self.most = _whole_number(form, "max_prompt_tokens")
        self.limit = _whole_number(options, "max_length" if options.get("max_length") else "max_new_tokens", positions)
        self.beams = _whole_number(options, "num_beams", MOST_BEAMS)
        self.around = "{prompt}" if self.is_pair else form["prompt"]
        self.around.format(prompt="")  # raises if it is no template

    def read(self, row: Row) -> list[int]:
        """The tokens of a prompt: of the template of training over the columns, or of the column `prompt`.

        A plain line is a whole prompt, and so is the column `prompt` where a column of the template is missing.
        """
        template = self.template
        if template is None or row.is_plain or (self.column in row.values and set(template.columns) - set(row.values)):
            prompt = row.text(self.column)
        else:
            prompt = template.fill(row)
        if not prompt.strip():
            raise DataError(f"{row.where} has an empty prompt: fill it in or delete the line.")
        tokens, count = self._tokens(prompt)
        if count > self.most:
            raise DataError(
                f"{row.where} has a prompt of {count} tokens: the model takes at most {self.most}; shorten it."
            )
        return tokens

    def _tokens(self, prompt: str) -> tuple[list[int], int]:
        """(the tokens before the text, the number of tokens of the prompt in them)."""
        if self.is_pair:
            tokens = input_tokens(prompt, self.tokenizer)
            return tokens, len(tokens)
        around = self.tokenizer(self.around.format(prompt=""), add_special_tokens=False).input_ids
        tokens = self.tokenizer(self.around.format(prompt=prompt), add_special_tokens=False).input_ids
        return list(tokens), len(tokens) - len(around)

    def answer(self, inputs: Sequence[list[int]]) -> list[dict[str, Any]]:
        """The generated texts, by beam search as in the evaluations of training."""
        known: dict[str, Any] = {"max_length": self.limit, "beams": self.beams, "device": self.device}
        with torch.inference_mode():
            texts = write_texts(self.model, self.tokenizer, inputs, batch_size=len(inputs), **known)
            return [{"generated": text} for text in texts]


def _whole_number(form: Mapping[str, Any], key: str, most: int | None = None) -> int:
    """The number of this key. Raises KeyError without it, and ValueError for any other value than 1 to `most`."""
    value = form[key]
    if type(value) is not int or value < 1 or (most is not None and value > most):
        raise ValueError(f"{key}, which is {value!r}")
    return value


def load_answerer(folder: Path, *, device: torch.device) -> Answerer:
    """The model in a run's folder, or in a copy of its `model/`, with its format. Raises ConfigError."""
    released = next((each for each in (folder / "model", folder) if (each / PROMPT).is_file()), None)
    if released is None:
        raise ConfigError(f"{folder} holds no {PROMPT}; give the folder of a run of a language task, or its model/")
    try:
        form = parse_json((released / PROMPT).read_text())
        kind = form.get("task", "generation")  # runs of older versions have no other task
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{released / PROMPT} cannot be read; copy the model's folder again") from error
    make = getattr(component("task", kind)(), "answerer", None) if kind in names("task") else None
    if make is None:
        raise ConfigError(f"{released} is of task={kind}, which cannot answer; install the package that adds the task")
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = load_model(released).to(device)
    try:
        answerer: Answerer = make(model, _tokenizer(released), form=form, device=device)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{released / PROMPT} has no usable {error}; copy the model's folder again") from error
    answerer.digest = _digest(released)
    return answerer


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    from memsave.tasks.language.pretrained import NO_CODE, readable

    with readable(lambda reason: f"{folder} holds no tokenizer that can be read ({reason}); copy it again"):
        return AutoTokenizer.from_pretrained(folder, **NO_CODE)


def _digest(folder: Path) -> str:
    """A digest of the names and contents of the files of a model."""
    digest = hashlib.sha256()
    for path in sorted(each for each in folder.iterdir() if each.is_file()):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]
