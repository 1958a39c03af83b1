"""Texts as tokens: templates, label words, cuts inside the fields, and one sentence for each fault."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from memsave.config import ConfigError
from memsave.data.errors import DataError
from memsave.data.text.feedback import public_reviews
from memsave.data.text.templates import Template, Text, collate_texts, encode_texts, label_word_tokens
from memsave.tasks.language.small_gpt2 import train_tokenizer
from memsave.tasks.language.small_roberta import train_masked_tokenizer

MASKED = Template("{text} It was {mask}.", 24, True)
PAIRS = Template("{text}? {mask}, {pair}", 24, True)


@pytest.fixture(scope="module")
def masked():
    return train_masked_tokenizer(public_reviews(300), size=700)


@pytest.fixture(scope="module")
def causal():
    return train_tokenizer(public_reviews(300), size=700)


def word_piece(words):
    """A tokenizer like BERT's, with token types."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *words]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    special = {f"{key}_token": f"[{key.upper()}]" for key in ("pad", "cls", "sep", "mask", "unk")}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **special)


def test_the_filled_template_reads_as_one_text(masked):
    (found,), cuts = encode_texts([Text("Cold soup.")], masked, MASKED)
    assert masked.decode(found.ids) == "<s>Cold soup. It was<mask>.</s>"
    assert found.ids == masked("Cold soup. It was <mask>.").input_ids
    assert found.ids[found.position] == masked.mask_token_id
    assert (cuts.examples, cuts.cut_examples) == (1, 0)


def test_a_mark_of_the_template_replaces_that_of_the_text(masked):
    (found,), _ = encode_texts([Text("Is it cold?!", "The soup was warm.")], masked, PAIRS)
    assert masked.decode(found.ids) == "<s>Is it cold?<mask>, The soup was warm.</s>"


def test_braces_in_a_text_are_text(masked):
    (found,), _ = encode_texts([Text("{pair} {mask}", "{text}")], masked, PAIRS)
    assert masked.decode(found.ids) == "<s>{pair} {mask}?<mask>, {text}</s>"


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=60)


@settings(deadline=None, max_examples=60)
@given(texts, texts, st.integers(14, 40))
def test_a_long_text_is_cut_inside_its_fields(masked, text, pair, length):
    form = Template("{text} ? {mask}, {pair}", length, True)
    whole = len(masked(form.fill(Text(text, pair), mask="<mask>")).input_ids)
    (found,), cuts = encode_texts([Text(text, pair)], masked, form)
    assert len(found.ids) <= length
    assert found.ids.count(masked.mask_token_id) == 1
    assert found.ids[found.position] == masked.mask_token_id
    assert found.ids[found.position + 1] == masked.convert_tokens_to_ids(",")
    assert (found.ids[0], found.ids[-1]) == (masked.bos_token_id, masked.eos_token_id)
    assert cuts.cut_examples == (whole > length)
    assert cuts.cut_tokens == max(0, whole - length)


def test_the_longer_field_is_cut_first(masked):
    row = Text("The soup was very cold and the room was noisy and broken and slow", "Warm bread")
    (found,), _ = encode_texts([row], masked, PAIRS)
    decoded = masked.decode(found.ids)
    assert decoded.endswith("<mask>, Warm bread</s>")
    assert decoded.startswith("<s>The soup was")


def test_tokenizers_without_offsets_cut_letters(masked, monkeypatch):
    monkeypatch.setattr(type(masked), "is_fast", False)
    (found,), _ = encode_texts([Text("The soup was cold. " * 6)], masked, MASKED)
    assert len(found.ids) <= 24
    assert masked.decode(found.ids).endswith("It was<mask>.</s>")


def test_a_template_that_is_too_long_alone_is_refused(masked):
    with pytest.raises(ConfigError, match=r"data.max_length is 5, but task.template alone has 6 tokens"):
        encode_texts([Text("cold")], masked, Template("{text} It was {mask}.", 5, True))


def test_a_text_with_the_mask_token_is_refused(masked):
    with pytest.raises(DataError, match=r"'a <mask> b' contains the mask token <mask>"):
        encode_texts([Text("a <mask> b")], masked, MASKED)


def test_without_template_pairs_have_token_types():
    tokenizer = word_piece(["a", "b", "c"])
    rows = [Text("a b c a b", "c"), Text("a", "b")]
    found, cuts = encode_texts(rows, tokenizer, Template(None, 6))
    assert [len(each.ids) for each in found] == [6, 5]
    assert found[1].types == [0, 0, 0, 1, 1]
    assert (cuts.cut_examples, cuts.cut_tokens) == (1, 3)
    batch = collate_texts(found, pad=0)
    assert batch["token_type_ids"].shape == batch["input_ids"].shape == (2, 6)
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 5 + [0]]
    single, _ = encode_texts([Text("a")], tokenizer, Template(None, 6))
    assert "token_type_ids" not in collate_texts(single, pad=0)


def test_a_causal_template_ends_before_the_label(causal):
    form = Template("{text} It was {label}", 24)
    (found,), _ = encode_texts([Text("Cold soup.")], causal, form)
    assert causal.decode(found.ids) == "Cold soup. It was"
    assert found.position == len(found.ids) - 1
    assert encode_texts([Text("Cold soup.")], causal, Template("{text} It was", 24))[0] == [found]
    great = label_word_tokens(["great"], causal, form)
    assert great == causal(" great", add_special_tokens=False).input_ids


def test_label_words_take_the_space_of_the_template(masked):
    spaced = label_word_tokens(["terrible", "great"], masked, MASKED)
    assert masked.convert_ids_to_tokens(spaced) == ["Ġterrible", "Ġgreat"]
    assert label_word_tokens(["Y", "N"], masked, Template("{mask}{text}", 24, True)) == [
        masked.convert_tokens_to_ids(each) for each in "YN"
    ]
    tokenizer = word_piece(["yes", "no"])
    assert label_word_tokens(["yes", "no"], tokenizer, MASKED) == [5, 6]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["great", "extraordinary"], r"has 'extraordinary', which is \d+ tokens .* and not 1"),
        (["great", "great"], "'great' and 'great', which are the same token"),
    ],
)
def test_wrong_label_words_give_one_sentence(masked, words, sentence):
    with pytest.raises(ConfigError, match=sentence):
        label_word_tokens(words, masked, MASKED)


def test_an_unknown_label_word_is_refused():
    with pytest.raises(ConfigError, match="'maybe', which this tokenizer does not know"):
        label_word_tokens(["yes", "maybe"], word_piece(["yes"]), MASKED)


@pytest.mark.parametrize(
    ("form", "has_pairs", "words"),
    [
        (Template("{text} was it.", 24, True), False, r"must have \{mask\} once, not 0 times"),
        (Template("{text} {mask} {mask}", 24, True), False, r"must have \{mask\} once, not 2 times"),
        (Template("It was {mask}.", 24, True), False, r"must have \{text\} once"),
        (Template("{text} {mask}", 24, True), True, r"must have \{pair\} once"),
        (Template("{text} {mask} {pair}", 24, True), False, "there are no pairs"),
        (Template("{sentence} {mask}", 24, True), False, r"its fields are \{text\}, \{mask\}, not \{sentence\}"),
        (Template("{text} {mask}", 24), False, r"its fields are \{text\}, \{label\}, not \{mask\}"),
        (Template("{label} {text}", 24), False, r"\{label\} must stand at its end"),
    ],
)
def test_wrong_templates_give_one_sentence(form, has_pairs, words):
    with pytest.raises(ConfigError, match=words):
        form.check(has_pairs=has_pairs)


def test_no_texts_make_an_empty_batch():
    batch = collate_texts([], pad=0)
    assert batch["input_ids"].shape == (0, 1)
    assert batch["position"].dtype == torch.long
