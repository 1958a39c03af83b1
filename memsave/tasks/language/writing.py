"""`WritingTask`: what tasks have in common whose samples are texts that the model writes after prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from memsave.tasks.language.decoding import write_texts_together
from memsave.tasks.language.task import LanguageTask
from memsave.training.loop import autocast, evaluating

SAMPLES = 8  # prompts in samples.md


@dataclass(frozen=True)
class Evaluation:
    """The generated texts of one evaluation, by prompt, and its scores."""

    texts: dict[str, str]
    scores: dict[str, float]


class WritingTask(LanguageTask):
    """A language task that writes texts at each evaluation. A subclass sets the attributes and implements `evaluate`.

    Args:
        beams: width of the beam search.
        max_length: tokens of a prompt and its text together.
        options: as for `LanguageTask`.
    """

    names: ClassVar[Mapping[str, str]]
    """The scores of the summary, and what it calls them."""
    title: ClassVar[str]
    """The first line of samples.md."""
    source: ClassVar[str]
    """What the scores are about."""

    def __init__(self, *parts: Any, beams: int, max_length: int, **options: Any):
        super().__init__(*parts, **options)
        self.beams, self.max_length = beams, max_length
        self.evaluations: list[Evaluation] = []

    def encode_prompt(self, prompt: str) -> list[int]:
        """The tokens of a prompt."""
        raise NotImplementedError

    def reference(self, prompt: str) -> str:
        """The text of the held-out data for a prompt."""
        raise NotImplementedError

    def write(self, model: nn.Module, prompts: Sequence[str]) -> dict[str, str]:
        """Generate a text for each prompt by beam search; returns them by prompt."""
        tokens = [self.encode_prompt(prompt) for prompt in prompts]
        options: dict[str, Any] = {"max_length": self.max_length, "beams": self.beams}
        with evaluating(model), autocast(model, self.precision):
            texts = write_texts_together(model, self.tokenizer, tokens, **options, device=self.device)
        return dict(zip(prompts, texts, strict=True))

    def show(self, folder: Path) -> list[Path]:
        """Write `samples.md`: prompts with the generated texts of the first and of the last evaluation."""
        path = folder / "samples.md"
        first, last = self.evaluations[0], self.evaluations[-1]
        lines = [f"# {self.title}", ""]
        for prompt in list(last.texts)[:SAMPLES]:
            lines += [f"**{_line(prompt)}**", ""]
            if first is not last:
                lines.append(f"- before: {_line(first.texts[prompt])}")
            lines += [f"- after: {_line(last.texts[prompt])}", f"- reference: {_line(self.reference(prompt))}", ""]
        path.write_text("\n".join(lines), encoding="utf-8")
        return [path]

    def summary(self, scores: dict[str, float]) -> str:
        """The scores in one line, with those before training if there are any."""
        first = self.evaluations[0].scores
        each = (
            f"{name} {scores[key]:.2f}" + (f" (before: {first[key]:.2f})" if first is not scores else "")
            for key, name in self.names.items()
        )
        return f"On {self.source}: {', '.join(each)}"


def _line(text: str) -> str:
    """The text on one line."""
    return " ".join(text.split())
