"""Records as tokens: `prompt <eos> completion <eos>`, where only the completion and its end are targets.

Before the prompt comes the token with which the tokenizer begins every text, if it does.
With a separator, the form is `prompt separator completion <eos>`; the separator is a part of the completion.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from memsave.data.text.collate import IGNORED, Example, Tokens, token_ids
from memsave.data.text.records import Record


@dataclass
class Cuts:
    """Counts of the examples and tokens that truncation to the maximum length affects."""

    examples: int = 0
    cut_examples: int = 0
    cut_tokens: int = 0
    lost_texts: int = 0
    """Examples whose prompt fills the maximum length: one token of their text is left as a target."""

    def describe(self, *, max_length: int) -> str:
        """The counts in words."""
        if not self.cut_examples:
            return f"none cut to {max_length} tokens (data.max_length)"
        lost = f"{self.cut_examples} cut to {max_length} tokens (data.max_length), which drops {self.cut_tokens} tokens"
        return lost + (f"; {self.lost_texts} of them keep a single token of their text" if self.lost_texts else "")


def encode_records(
    records: Iterable[Record], tokenizer: Any, *, max_length: int, separator: str | None = None
) -> tuple[list[Example], Cuts]:
    """The tokens of each record, cut to at most `max_length`, and the counts of cut tokens.

    The completion is cut first, then the prompt; at least one token of the completion stays as a target.
    """
    found, cuts = [], Cuts()
    for record in records:
        prompt = prompt_tokens(record.prompt, tokenizer, separator=separator)
        completion = [*token_ids((separator or "") + record.completion, tokenizer), tokenizer.eos_token_id]
        kept = _cut_prompt(prompt, max_length=max_length, ends=separator is None)
        target = completion[: max_length - len(kept)]
        lost = len(prompt) + len(completion) - len(kept) - len(target)
        cuts.examples += 1
        cuts.cut_examples += lost > 0
        cuts.cut_tokens += lost
        cuts.lost_texts += len(target) == 1 < len(completion)
        found.append([Tokens([*kept, *target], [*[IGNORED] * len(kept), *target])])
    return found, cuts


def encode_prompt(prompt: str, tokenizer: Any, *, max_length: int, separator: str | None = None) -> list[int]:
    """The tokens before the completion, as `encode_records` cuts them."""
    tokens = prompt_tokens(prompt, tokenizer, separator=separator)
    return _cut_prompt(tokens, max_length=max_length, ends=separator is None)


def start_ids(tokenizer: Any) -> list[int]:
    """The token with which the tokenizer begins every text, as those of Llama and Gemma do; empty for others."""
    start = [tokenizer.bos_token_id]
    return start if list(tokenizer("").input_ids)[:1] == start else []


def prompt_tokens(prompt: str, tokenizer: Any, *, separator: str | None = None) -> list[int]:
    """The tokens of a prompt before the separator: never none, because a model predicts no first token."""
    tokens = [*start_ids(tokenizer), *token_ids(prompt, tokenizer)]
    return [*tokens, tokenizer.eos_token_id] if separator is None or not tokens else tokens


def _cut_prompt(tokens: list[int], *, max_length: int, ends: bool) -> list[int]:
    """At most `max_length - 1` tokens; with `ends`, the last one stays, which separates the completion."""
    if len(tokens) <= max_length - 1:
        return tokens
    return [*tokens[: max_length - 2], tokens[-1]] if ends else tokens[: max_length - 1]


def prompt_format(tokenizer: Any, *, max_length: int, beams: int, separator: str | None = None) -> dict[str, Any]:
    """The prompt format of a model trained on the examples of `encode_records`: `prompt.json` in its folder.

    `prompt`, filled with a text of at most `max_prompt_tokens` tokens, has the tokens that `encode_prompt` gives it.
    `generate` holds the options of transformers' `generate` that evaluation uses.
    """
    start, end = tokenizer.decode(start_ids(tokenizer)), tokenizer.eos_token
    return {
        "task": "generation",
        "prompt": f"{start}{{prompt}}{end if separator is None else ''}",
        "completion": f"{separator or ''}{{completion}}{end}",
        "separator": separator,
        "add_special_tokens": False,
        "max_prompt_tokens": max_length - 2 - len(start_ids(tokenizer)),
        "generate": {
            "max_length": max_length,
            "num_beams": beams,
            "do_sample": False,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
    }
