"""Training and held-out data by files and by fractions."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsave.data import DataError
from memsave.data.text.records import Record
from memsave.data.text.splits import hold_out, raw_data, refuse_shared_units, split_files

SUFFIXES = (".csv", ".jsonl")


def split(items, *, fraction=0.3, seed=0):
    return hold_out(items, key=lambda each: each.lower(), fraction=fraction, seed=seed, source="a.csv")


@given(st.sets(st.text("abcde", min_size=1), min_size=2), st.floats(0, 0.9), st.integers(0, 9))
def test_each_item_is_on_one_side_with_its_equals(keys, fraction, seed):
    items = [each for key in sorted(keys) for each in (key, key.upper())]
    training, held_out = split(items, fraction=fraction, seed=seed)
    assert sorted(training + held_out) == sorted(items)
    assert training
    assert held_out
    assert not {each.lower() for each in training} & {each.lower() for each in held_out}
    assert split(items, fraction=fraction, seed=seed) == (training, held_out)


def test_the_fraction_is_that_of_the_keys_and_depends_on_the_seed():
    items = [f"{number}" for number in range(2000)]
    _, one = split(items)
    _, other = split(items, seed=1)
    assert 500 < len(one) < 700
    assert one != other


def test_another_item_does_not_move_the_others():
    items = [f"{number}" for number in range(200)]
    training, held_out = split(items)
    more, more_held_out = split(["new", *items])
    assert [each for each in more if each != "new"] == training
    assert [each for each in more_held_out if each != "new"] == held_out


def test_a_single_key_cannot_be_split():
    with pytest.raises(DataError, match=r"a\.csv has a single example .*data\.held_out=FILE"):
        split(["a", "A"])


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ("train.csv test.csv dev.csv", ("train.csv", "test.csv")),
        ("train.csv dev.jsonl train.txt", ("train.csv", "dev.jsonl")),
        ("train.jsonl", ("train.jsonl", None)),
    ],
)
def test_a_folder_names_its_files(tmp_path, present, expected):
    for name in present.split():
        (tmp_path / name).touch()
    found = split_files(tmp_path, held_out=None, suffixes=SUFFIXES)
    assert tuple(each and each.name for each in found) == expected
    assert split_files(tmp_path, held_out="x.csv", suffixes=SUFFIXES)[1].name == "x.csv"
    assert split_files(tmp_path / "a.csv", held_out=None, suffixes=SUFFIXES) == (tmp_path / "a.csv", None)


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ("test.csv", r"holds no train\.csv or train\.jsonl: name the training file"),
        ("train.csv train.jsonl", r"holds train\.csv and train\.jsonl: delete or move"),
        ("train.csv dev.csv dev.jsonl", r"holds dev\.csv and dev\.jsonl"),
    ],
)
def test_folders_without_one_file_are_refused(tmp_path, present, message):
    for name in present.split():
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=message):
        split_files(tmp_path, held_out=None, suffixes=SUFFIXES)


def of_person(text, unit):
    return Record(text, text, unit)


def test_records_of_a_person_are_on_one_side():
    records = [of_person(f"{number % 7}", f"person {number % 40}") for number in range(200)]
    options = {"key": lambda each: each.prompt, "seed": 0, "source": "a.csv"}
    training, held_out = hold_out(records, fraction=0.3, **options)
    people = [{each.unit for each in part} for part in (training, held_out)]
    assert people[0] and people[1] and not people[0] & people[1]
    assert {each.prompt for each in training} & {each.prompt for each in held_out}  # prompts need not stay together
    with pytest.raises(DataError, match=r"a\.csv has a single person \(data\.unit\) to train on"):
        hold_out(records[:1] * 5, fraction=0.3, **options)


def test_the_raw_data_are_those_of_the_training_file():
    options = {"key": str, "fraction": 0.5, "source": "a.csv"}
    splits = [hold_out(list("abcdef"), seed=seed, **options) for seed in range(3)]
    assert len({len(train) for train, _ in splits} | {tuple(train) for train, _ in splits}) > 2
    assert {"".join(sorted(raw_data(*each))) for each in splits} == {"abcdef"}
    assert raw_data(["a"], ["b"]) == ["a"]  # of another file


def test_a_person_in_both_files_is_refused():
    train, out = [of_person("a", "Ada"), of_person("b", "Bo"), of_person("c", "Cy")], [of_person("d", "Dan")]
    path = Path("test.csv")
    refuse_shared_units(train, out, held_out=path)
    refuse_shared_units([Record("a", "b")], [Record("a", "b")], held_out=path)  # without data.unit
    with pytest.raises(DataError, match=r"test\.csv has records of 'Ada' \(data\.unit\), who also has records in the"):
        refuse_shared_units(train, [*out, train[0]], held_out=path)
    with pytest.raises(DataError, match=r"'Ada' and another one .* who also have records"):
        refuse_shared_units(train, train[:2], held_out=path)
    with pytest.raises(DataError, match="'Ada' and 2 others"):
        refuse_shared_units(train, train, held_out=path)
