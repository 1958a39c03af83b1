"""Generated telephone calls: deterministic, answerable from the record, and short enough for the default model."""

import pytest

from memsave.data import DataError
from memsave.data.text.calls import PRIVATE, PUBLIC, CallsData, private_dialogs, public_dialogs


@pytest.mark.parametrize("make", [public_dialogs, private_dialogs])
def test_a_call_depends_only_on_its_part_seed_and_number(make):
    dialogs = make(30, seed=3)
    assert make(10, seed=3) == dialogs[:10]
    assert make(30, seed=4) != dialogs
    assert len({each.messages[0] for each in dialogs}) == 30


def test_the_parts_and_the_splits_differ():
    assert public_dialogs(20) != private_dialogs(20)
    training, held_out = CallsData(records=200, held_out=50).splits()
    assert (len(training), len(held_out)) == (200, 50)
    assert not {each.messages[0] for each in training} & {each.messages[0] for each in held_out}


@pytest.mark.parametrize("lines", [PUBLIC, PRIVATE])
def test_every_answer_contains_its_value(lines):
    for line in lines:
        for name, topic in line.topics.items():
            assert all(f"{{{name}}}" in answer for answer in topic.answers), name


@pytest.mark.parametrize("make", [public_dialogs, private_dialogs])
def test_a_call_has_a_record_and_alternating_turns(make):
    for dialog in make(200):
        roles = [message.role for message in dialog.messages]
        assert roles == ["system", *["user", "assistant"] * (len(roles) // 2)]
        assert not any("{" in message.content for message in dialog.messages)


def test_a_number_below_one_is_an_error():
    with pytest.raises(DataError, match="number of dialogs is 0: give at least 1"):
        private_dialogs(0)
