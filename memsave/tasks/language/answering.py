"""Answers of a released language model: what `python -m memsave.generate` asks of a task.

`model/` holds `prompt.json`, which says how an input becomes tokens. The config class of the task makes the `Answerer`.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from memsave.config import ConfigError
from memsave.config.registry import component, names
from memsave.data.errors import DataError
from memsave.data.text.own_records import Template
from memsave.data.text.tables import Row
from memsave.tasks.language.decoding import write_texts
from memsave.tasks.loading import load_model

PROMPT = "prompt.json"


class Answerer(Protocol):
    """A trained model with the format of its inputs."""

    digest: str
    """Identifies the model."""
    column: str
    """The column of an input of plain lines."""

    def read(self, row: Row) -> Any:
        """The input of a row. Raises DataError, which names the line, if it cannot be used."""

    def answer(self, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """The answers to a batch of inputs, by column."""


class TextAnswerer:
    """Texts for prompts, by a model of task=generation."""

    column = "prompt"

    def __init__(self, model: Any, tokenizer: Any, *, form: dict[str, Any], device: torch.device):
        self.model, self.tokenizer, self.form, self.device = model, tokenizer, form, device
        self.template = Template(form.get("template") or "{prompt}", key="prompt")
        self.digest = ""

    def read(self, row: Row) -> list[int]:
        """The tokens of a prompt: of the column `prompt`, or of the template of training over the columns."""
        prompt = row.text(self.column) if self.column in row.values else self.template.fill(row)
        if not prompt.strip():
            raise DataError(f"{row.where} is empty: delete it, or give it a prompt.")
        text = self.form["prompt"].format(prompt=prompt)
        tokens = list(self.tokenizer(text, add_special_tokens=self.form["add_special_tokens"]).input_ids)
        around = len(self.tokenizer(self.form["prompt"].format(prompt=""), add_special_tokens=False).input_ids)
        count, most = len(tokens) - around, self.form["max_prompt_tokens"]
        if count > most:
            raise DataError(f"{row.where} has a prompt of {count} tokens: the model takes at most {most}; shorten it.")
        return tokens

    def answer(self, inputs: Sequence[list[int]]) -> list[dict[str, Any]]:
        """The generated texts, by beam search as in the evaluations of training."""
        options = self.form["generate"]
        limit = options.get("max_length") or options["max_new_tokens"]
        known: dict[str, Any] = {"max_length": limit, "beams": options["num_beams"], "device": self.device}
        with torch.inference_mode():
            return [{"generated": text} for text in write_texts(self.model, self.tokenizer, inputs, **known)]


def load_answerer(folder: Path, *, device: torch.device) -> Answerer:
    """The model in a run's folder, or in a copy of its `model/`, with its format. Raises ConfigError."""
    released = next((each for each in (folder / "model", folder) if (each / PROMPT).is_file()), None)
    if released is None:
        raise ConfigError(f"{folder} holds no {PROMPT}; give the folder of a run of a language task, or its model/")
    try:
        form = json.loads((released / PROMPT).read_text())
        kind = form["task"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{released / PROMPT} cannot be read; copy the model's folder again") from error
    if kind not in names("task"):
        raise ConfigError(f"{released} is of task={kind}, which is not registered; install the package that adds it")
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = load_model(released).to(device)
    tokenizer = AutoTokenizer.from_pretrained(released)
    answerer: Answerer = component("task", kind)().answerer(model, tokenizer, form=form, device=device)
    answerer.digest = _digest(released)
    return answerer


def _digest(folder: Path) -> str:
    """A digest of the names, sizes and times of the files of a model, and of its format."""
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir())
    return hashlib.sha256(repr((files, (folder / PROMPT).read_text())).encode()).hexdigest()[:16]
