"""Texts and pairs of texts as tokens of a classifier, with or without a template.

    "{text} It was {mask}."         a masked language model predicts the token at the mask (Gao et al. 2021)
    "{text}? {mask}, {pair}"        the same for pairs
    "{text} It was {label}"         a causal language model predicts the token that follows; {label} may be left out

Without a template, the tokenizer joins text and pair in its own way. The whole filled template is split into tokens, so
that a text reads as in pretraining. A longer text is cut inside {text} and {pair}, the longer one first. A punctuation
mark after a field in the template replaces those at the end of the text.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memsave.config import ConfigError
from memsave.data.errors import DataError
from memsave.data.text.encode import Cuts

FIELD = re.compile(r"\{(\w*)\}")
_FILLED = re.compile(r"\{(text|pair|mask|label)\}(?=([.,;:?!])?)")
_MARKS = " .,;:?!"


class Text(NamedTuple):
    """A text to classify; for pairs with a second text."""

    text: str
    pair: str | None = None


@dataclass(frozen=True)
class Template:
    """How a text becomes tokens."""

    template: str | None
    """The template, or None for the tokenizer's own format."""
    max_length: int
    """Maximum number of tokens."""
    masked: bool = False
    """Whether the label word stands at the mask, and not after the last token."""

    def check(self, *, has_pairs: bool) -> None:
        """Raise ConfigError for a template with missing or wrong fields."""
        if self.template is None:
            return
        found = FIELD.findall(self.template)
        valid = ["text", *(["pair"] if has_pairs else []), "mask" if self.masked else "label"]
        start = f"task.template is {self.template!r}"
        for name in found:
            if name == "pair" and not has_pairs:
                raise ConfigError(
                    f"{start}, but there are no pairs; leave {{pair}} out, or name its column by data.pair"
                )
            if name not in valid:
                raise ConfigError(
                    f"{start}; its fields are {', '.join(f'{{{each}}}' for each in valid)}, not {{{name}}}"
                )
        needed = [*valid[:-1], *(["mask"] if self.masked else [])]
        for name in needed:
            if found.count(name) != 1:
                raise ConfigError(f"{start}; it must have {{{name}}} once, not {found.count(name)} times")
        if "label" in found and (found.count("label") > 1 or not self.template.rstrip().endswith("{label}")):
            raise ConfigError(f"{start}; {{label}} must stand at its end, because a causal model predicts what follows")

    def fill(self, row: Text, *, mask: str = "") -> str:
        """The template with the text, its pair and the mask token."""
        values = {"text": row.text, "pair": row.pair or "", "mask": mask, "label": ""}

        def value(found: re.Match[str]) -> str:
            name, mark = found.groups()
            return values[name].rstrip(_MARKS) if mark and name in ("text", "pair") else values[name]

        filled = _FILLED.sub(value, str(self.template))
        return filled if self.masked else filled.rstrip()

    def slot_follows_space(self) -> bool:
        """Whether the label word has a space before it."""
        template, slot = str(self.template), "{mask}" if self.masked else "{label}"
        return slot not in template or template[: template.index(slot)][-1:].isspace()


class Encoded(NamedTuple):
    """The tokens of one text."""

    ids: list[int]
    types: list[int] | None
    """The part, 0 or 1, to which each token belongs; None if all belong to part 0, as models then assume."""
    position: int
    """Of the mask, or of the last token."""


def encode_texts(rows: Sequence[Text], tokenizer: Any, form: Template) -> tuple[list[Encoded], Cuts]:
    """The tokens of each text, at most `max_length`, and the counts of cut tokens.

    Raises DataError for a text that contains the mask token, and ConfigError if a template alone is too long.
    """
    if not rows:
        return [], Cuts()
    mask = tokenizer.mask_token if form.masked else ""
    found = _tokens(tokenizer, rows, form, mask)
    cuts = Cuts(examples=len(rows))
    for number, row in enumerate(rows):
        excess = len(found[number].ids) - form.max_length
        if excess > 0:
            found[number] = _shortened(tokenizer, row, form, mask, found[number])
            cuts.cut_examples += 1
            cuts.cut_tokens += excess
    if not form.masked:
        return found, cuts
    return [_at_mask(each, row, tokenizer) for each, row in zip(found, rows, strict=True)], cuts


def label_word_tokens(words: Sequence[str], tokenizer: Any, form: Template) -> list[int]:
    """The token of each label word, with a space before it if the template has one. Raises ConfigError."""
    found: dict[int, str] = {}
    for word in words:
        text = f"{' ' if form.slot_follows_space() else ''}{word}"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        while len(ids) > 1 and not tokenizer.decode(ids[:1]).strip():  # some tokenizers split the space off
            ids = ids[1:]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            parts = [each.replace("Ġ", " ") for each in tokenizer.convert_ids_to_tokens(ids)]
            raise ConfigError(
                f"task.label_words has {word!r}, which is {len(ids)} tokens ({' '.join(map(repr, parts))}) and not 1 "
                f"for this tokenizer; give a word of one token"
                if len(ids) != 1
                else f"task.label_words has {word!r}, which this tokenizer does not know; give another word"
            )
        if ids[0] in found:
            raise ConfigError(
                f"task.label_words has {found[ids[0]]!r} and {word!r}, which are the same token; give different words"
            )
        found[ids[0]] = word
    return list(found)


def collate_texts(texts: Sequence[Encoded], *, pad: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask`, and `token_type_ids` if there are any, (B, T), and `position` (B,).

    Padded on the right; (0, 1) for no texts.
    """
    length = max((len(each.ids) for each in texts), default=1)
    ids = torch.full((len(texts), length), pad)
    mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, each in enumerate(texts):
        count = len(each.ids)
        ids[row, :count], mask[row, :count] = torch.tensor(each.ids), 1
        if each.types is not None:
            types[row, :count] = torch.tensor(each.types)
    found = {"input_ids": ids, "attention_mask": mask}
    if any(each.types is not None for each in texts):
        found["token_type_ids"] = types
    return {**found, "position": torch.tensor([each.position for each in texts], dtype=torch.long)}


def _tokens(tokenizer: Any, rows: Sequence[Text], form: Template, mask: str, **options: Any) -> list[Encoded]:
    if form.template is not None:
        found = tokenizer([form.fill(row, mask=mask) for row in rows], verbose=False, **options)
    elif rows[0].pair is None:
        found = tokenizer([row.text for row in rows], verbose=False, **options)
    else:
        found = tokenizer([row.text for row in rows], [row.pair or "" for row in rows], verbose=False, **options)
    types = found.get("token_type_ids") or [None] * len(rows)
    ends = tokenizer.eos_token_id if form.template is not None and not form.masked else None
    encoded = []
    for ids, kinds in zip(found["input_ids"], types, strict=True):
        if ids and ids[-1] == ends:  # a tokenizer that ends each text, after which no word follows
            ids, kinds = ids[:-1], kinds and kinds[:-1]
        encoded.append(Encoded(list(ids), list(kinds) if kinds and any(kinds) else None, len(ids) - 1))
    return encoded


def _shortened(tokenizer: Any, row: Text, form: Template, mask: str, encoded: Encoded) -> Encoded:
    """The tokens of the row with shorter fields, until they fit."""
    if form.template is None:
        options = {"truncation": True, "max_length": form.max_length}
        return _tokens(tokenizer, [row], form, mask, **options)[0]
    excess, fields = len(encoded.ids) - form.max_length, row
    while excess > 0:
        if not fields.text and not fields.pair:
            raise ConfigError(
                f"data.max_length is {form.max_length}, but task.template alone has "
                f"{len(encoded.ids)} tokens; give a larger data.max_length or a shorter template"
            )
        fields = _without_last_tokens(tokenizer, fields, excess)
        encoded = _tokens(tokenizer, [fields], form, mask)[0]
        excess = len(encoded.ids) - form.max_length
    return encoded


def _without_last_tokens(tokenizer: Any, row: Text, count: int) -> Text:
    """The row without `count` tokens at the ends of its fields, taken from the field with more tokens."""
    starts = [_token_starts(tokenizer, each or "") for each in row]
    kept = [len(each) for each in starts]
    for _ in range(min(count, sum(kept))):
        kept[0 if kept[0] >= kept[1] else 1] -= 1
    text, pair = (
        each[: starts[i][kept[i]]] if each and kept[i] < len(starts[i]) else each for i, each in enumerate(row)
    )
    return Text(text or "", pair)


def _token_starts(tokenizer: Any, text: str) -> list[int]:
    """The start of each token in the text; of each letter for tokenizers that do not tell.

    The tokens of one letter have the same start, so that a cut before one of them always makes the text shorter.
    """
    offsets = []
    if getattr(tokenizer, "is_fast", False):
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        offsets = tokenizer(text, **options)["offset_mapping"]
    return [start for start, _ in offsets] or list(range(len(text)))


def _at_mask(encoded: Encoded, row: Text, tokenizer: Any) -> Encoded:
    count = encoded.ids.count(tokenizer.mask_token_id)
    if count != 1:
        raise DataError(
            f"The text {row.text[:40]!r} contains the mask token {tokenizer.mask_token} of the tokenizer: remove it."
        )
    return encoded._replace(position=encoded.ids.index(tokenizer.mask_token_id))


def template_of(prompt: Mapping[str, Any]) -> Template:
    """The template in the content of a `prompt.json`."""
    return Template(prompt["template"], prompt["max_length"], prompt["masked"])
