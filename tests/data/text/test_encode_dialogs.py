"""Dialogs as tokens: the targets are the replies alone, and rows lose and repeat none of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from memsave.data import DataError
from memsave.data.text.collate import IGNORED
from memsave.data.text.encode_dialogs import (
    PlainFormat,
    TemplateFormat,
    encode_context,
    encode_dialogs,
    format_of,
)
from memsave.data.text.messages import Dialog, Message
from tests.support.chat_tokenizers import CHATML, chat_tokenizer, plain_tokenizer

TALK = (
    Message("system", "customer: Ada"),
    Message("user", "Hello"),
    Message("assistant", "Hello Ada."),
    Message("user", "What is it?"),
    Message("assistant", "It is a lamp."),
)
PLAIN = plain_tokenizer()
CHAT = chat_tokenizer()
FORMS = {"plain": PlainFormat(PLAIN), "chat": TemplateFormat(CHAT)}


def targets(rows, form):
    return [form.tokenizer.decode([each for each in row.labels if each != IGNORED]) for row in rows]


def texts(rows, form):
    return [form.tokenizer.decode(row.ids) for row in rows]


def encode(messages, form, **options):
    (rows,), counts = encode_dialogs([Dialog(tuple(messages))], form, **{"max_length": 1000, **options})
    for row in rows:
        assert all(label in (IGNORED, token) for label, token in zip(row.labels, row.ids, strict=True))
        assert row.labels[0] == IGNORED
    return rows, counts


def test_the_plain_format_ends_each_message_and_has_replies_as_targets():
    rows, _ = encode(TALK, FORMS["plain"])
    end = "<|endoftext|>"
    written = "customer: Ada|user: Hello|assistant: Hello Ada.|user: What is it?|assistant: It is a lamp.|"
    assert texts(rows, FORMS["plain"]) == [written.replace("|", end)]
    assert targets(rows, FORMS["plain"]) == [f" Hello Ada.{end} It is a lamp.{end}"]


def test_a_chat_template_is_rendered_with_replies_and_their_end_as_targets():
    rows, _ = encode([*TALK, Message("user", "Bye")], FORMS["chat"])
    rendered = CHAT.apply_chat_template([each._asdict() for each in TALK], tokenize=False)
    assert texts(rows, FORMS["chat"]) == [rendered.removesuffix("\n")]
    assert targets(rows, FORMS["chat"]) == ["Hello Ada.<|im_end|>It is a lamp.<|im_end|>"]
    assert FORMS["chat"].ends == [CHAT.eos_token_id, CHAT.convert_tokens_to_ids("<|im_end|>")]


@pytest.mark.parametrize("name", FORMS)
def test_a_prompt_has_the_tokens_before_its_reply(name):
    rows, _ = encode(TALK, FORMS[name])
    for count in (2, 4):
        prompt = encode_context(TALK[:count], FORMS[name], limit=1000)
        assert rows[0].ids[: len(prompt)] == prompt
        assert rows[0].labels[len(prompt) - 1] == IGNORED
        assert rows[0].labels[len(prompt)] != IGNORED


def test_the_format_follows_the_template_of_the_tokenizer():
    assert [format_of(each).name for each in (PLAIN, CHAT)] == ["plain", "chat_template"]
    assert format_of(CHAT, template="plain").name == "plain"


LAST_ONLY = CHATML.replace("{{ message['content'] }}", "{% if loop.last %}(now) {% endif %}{{ message['content'] }}")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            LAST_ONLY,
            "written differently by the tokenizer's chat template when a turn is added to it: give task.template",
        ),
        (NO_SYSTEM, r"cannot be written by the tokenizer's chat template \(no system role\): give task.template=plain"),
    ],
)
def test_a_template_that_cannot_write_a_dialog_is_an_error(template, message):
    dialog = Dialog(TALK, "a.jsonl, line 3,")
    with pytest.raises(DataError, match=f"^a.jsonl, line 3, (is|cannot).*{message}|{message}"):
        encode_dialogs([dialog], TemplateFormat(chat_tokenizer(template)), max_length=100)


word = st.text("abc", min_size=1, max_size=3)
content = st.lists(word, min_size=1, max_size=6).map(" ".join)
turn = st.builds(Message, st.sampled_from(["user", "user", "assistant"]), content)


@given(
    name=st.sampled_from(sorted(FORMS)),
    system=st.lists(st.builds(Message, st.just("system"), content), max_size=1),
    turns=st.lists(turn, min_size=1, max_size=9).filter(lambda found: any(each.role == "assistant" for each in found)),
    max_length=st.integers(8, 70),
)
@settings(max_examples=150, deadline=None)
def test_rows_have_every_target_once_unless_a_reply_is_longer_than_a_row(name, system, turns, max_length):
    messages, form = [Message("user", "a"), *turns], FORMS[name]
    whole, _ = encode([*system, *messages], form)
    rows, counts = encode([*system, *messages], form, max_length=max_length)
    assert all(len(row.ids) <= max_length for row in rows)
    expected = [each for each in whole[0].labels if each != IGNORED]
    found = [each for row in rows for each in row.labels if each != IGNORED]
    assert len(found) == counts.targets == len(expected) - counts.cut_tokens
    if not counts.cut_replies:
        assert found == expected
    own = [len(form.tokenizer(each.content, add_special_tokens=False).input_ids) for each in turns]
    assert counts.cut_replies <= sum(length + 3 > max_length for length in own)
    assert counts.most_rows == len(rows)
    assert (len(rows) == 1) >= (len(whole[0].ids) <= max_length)


@pytest.mark.parametrize("name", FORMS)
def test_a_long_dialog_repeats_the_persona_and_the_recent_turns(name):
    system, form = Message("system", "SYS"), FORMS[name]
    talk = [message for i in range(12) for message in (Message("user", f"q{i}?"), Message("assistant", f"a{i}!"))]
    whole, _ = encode([system, *talk], form)
    length = len(whole[0].ids) // 2
    rows, counts = encode([system, *talk], form, max_length=length)
    assert (counts.split_examples, counts.most_rows, counts.replies) == (1, len(rows), 12)
    assert len(rows) > 2
    for row, wanted in zip(texts(rows, form), targets(rows, form), strict=True):
        assert "SYS" in row
        first = int(wanted.split("!")[0].split("a")[1])
        assert first == 0 or f"a{first - 1}!" in row  # the turn before the first target
    few, counts = encode([system, *talk], form, max_length=length, max_rows=2)
    assert few == rows[:2]
    kept = sum(each.count("!") for each in targets(few, form))
    assert (counts.omitted_replies, counts.cut_examples) == (12 - kept, 1)
    assert f"{12 - kept} replies beyond 2 rows (data.max_rows) are left out" in counts.describe(
        max_length=length, max_rows=2
    )


def test_a_reply_longer_than_a_row_is_cut_and_counted():
    form = FORMS["plain"]
    rows, counts = encode([Message("user", "Hi"), Message("assistant", "ab " * 40)], form, max_length=20)
    assert [len(row.ids) for row in rows] == [20]
    assert rows[0].labels.count(IGNORED) == 1
    whole, _ = encode([Message("user", "Hi"), Message("assistant", "ab " * 40)], form)
    lost = sum(each != IGNORED for each in whole[0].labels) - 19
    assert (counts.cut_replies, counts.cut_examples, counts.cut_tokens) == (1, 1, lost)
    assert f"1 replies are cut, which drops {lost} tokens" in counts.describe(max_length=20, max_rows=None)


@pytest.mark.parametrize("name", FORMS)
def test_a_context_keeps_the_persona_and_the_last_turns_that_fit(name):
    form = FORMS[name]
    talk = [Message("system", "SYS"), *TALK[1:], Message("user", "Bye")]
    whole = encode_context(talk, form, limit=1000)
    short = encode_context(talk, form, limit=len(whole) - 1)
    text = form.tokenizer.decode(short)
    assert "SYS" in text and "Bye" in text and "Hello Ada." not in text
    assert encode_context(talk, form, limit=5) == encode_context([talk[0], talk[-1]], form, limit=1000)[-5:]
