import re

import pytest

from memsave.data import DataError
from memsave.data.text.records import Record
from memsave.data.text.visits import PRIVATE, PUBLIC, private_records, public_records

PARTS = pytest.mark.parametrize("draw", [public_records, private_records])
COUNT = 4000


def parsed(table):
    """The attributes of a table by name; fails if the table does not have the challenge's format."""
    parts = table.split(", ")
    assert all(re.fullmatch(r"[a-z]+\[[^\[\],]+\]", part) for part in parts), table
    values = dict(part.removesuffix("]").split("[") for part in parts)
    assert len(values) == len(parts), table
    return values


def names(domains):
    return {name for domain in domains for name in (*domain.always, *domain.sometimes)}


@PARTS
def test_records_depend_only_on_seed_and_index(draw):
    assert draw(50, seed=3) == draw(80, seed=3)[:50]
    assert not set(draw(50, seed=3)) & set(draw(50, seed=4))


def test_records_are_the_same_in_every_process():
    assert public_records(1) == [
        Record(
            prompt="keeper[Orna Walley], remedy[Salamin], leaves[7 April], trouble[constant head pain], pet[horse], "
            "nights[14]",
            completion="For constant head pain, the horse of Orna Walley was given Salamin, stayed 14 nights and went "
            "home on 7 April.",
        )
    ]


@PARTS
def test_every_value_of_a_table_occurs_once_in_its_text(draw):
    for record in draw(COUNT):
        values = parsed(record.prompt).values()
        for value in values:
            assert re.search(rf"(?<!\w){re.escape(value)}(?!\w)", record.completion), record
        numbers = [number for value in values for number in re.findall(r"\d+", value)]
        assert sorted(re.findall(r"\d+", record.completion)) == sorted(numbers), record


@PARTS
def test_texts_are_sentences_of_a_readable_length(draw):
    for record in draw(COUNT):
        assert re.fullmatch(r"[A-Z][^<>\[\]{}|/.]*\.( [A-Z][^<>\[\]{}|/.]*\.)?", record.completion), record
        assert "  " not in record.completion and " ," not in record.completion and ",," not in record.completion, record
        assert 10 <= len(record.completion.split()) <= 35, record


@PARTS
def test_articles_fit_the_next_word(draw):
    texts = " ".join(record.completion for record in draw(COUNT))
    assert not re.search(r"\b([Aa] [aeiouAEIOU]|[Aa]n [^aeiouAEIOU])", texts)
    assert draw is private_records or (" a " in texts and " an " in texts)


@PARTS
def test_attributes_are_dropped_and_shuffled(draw):
    tables = [tuple(parsed(record.prompt)) for record in draw(COUNT)]
    for domain in PUBLIC if draw is public_records else PRIVATE:
        own = [table for table in tables if set(domain.always) <= set(table) <= {*domain.always, *domain.sometimes}]
        assert all(0 < sum(name in table for table in own) < len(own) for name in domain.sometimes)
        assert {table[0] for table in own} == {*domain.always, *domain.sometimes}


@PARTS
def test_no_train_runs_from_a_town_to_itself(draw):
    for record in draw(COUNT):
        values = list(parsed(record.prompt).values())
        assert len(set(values)) == len(values), record


@PARTS
def test_another_seed_gives_records_that_were_not_trained_on(draw):
    trained, held_out = draw(COUNT, seed=0), draw(COUNT, seed=1)
    assert len(set(trained)) >= 0.999 * COUNT
    assert len({r.prompt for r in trained} & {r.prompt for r in held_out}) <= 0.001 * COUNT
    # tables must differ in more than the order of their attributes
    sets = [{frozenset(parsed(r.prompt).items()) for r in records} for records in (trained, held_out)]
    assert len(sets[0] & sets[1]) <= 0.001 * COUNT


def test_public_and_private_parts_share_no_attributes():
    assert not names(PUBLIC) & names(PRIVATE)
    templates = [{template for domain in part for template in domain.templates} for part in (PUBLIC, PRIVATE)]
    assert not templates[0] & templates[1]


def test_public_and_private_parts_share_names():
    players, patients = (
        {parsed(record.prompt)[name].split()[-1] for record in draw(COUNT) if f"{name}[" in record.prompt}
        for draw, name in ((public_records, "player"), (private_records, "patient"))
    )
    assert len(players & patients) > 0.5 * len(patients)


@PARTS
def test_a_count_below_one_is_reported(draw):
    with pytest.raises(DataError, match=r"number of records is 0: give at least 1"):
        draw(0)
