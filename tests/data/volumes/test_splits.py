import itertools
import json

import pytest

from memsave.data import DataError
from memsave.data.volumes.layouts import Case
from memsave.data.volumes.splits import fold, split_cases, split_from_file


def test_a_split_is_disjoint_complete_and_repeatable(phantoms):
    train, validation = split_cases(phantoms, validation_fraction=0.25, seed=3)
    assert (len(train), len(validation)) == (3, 1)
    assert sorted(train + validation, key=lambda case: case.id) == phantoms
    assert split_cases(phantoms[::-1], validation_fraction=0.25, seed=3) == (train, validation)
    others = {split_cases(phantoms, validation_fraction=0.25, seed=seed)[1][0].id for seed in range(20)}
    assert len(others) == 4


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_no_side_of_a_split_is_empty(phantoms, fraction):
    assert all(split_cases(phantoms[:2], validation_fraction=fraction, seed=0))


def scans(*ids):
    """Cases whose ids number the scans of a patient, as in P1-000."""
    return [Case(id=id, images=(), label=None, patient=id.split("-")[0]) for id in ids]


def ids(cases):
    return [case.id for case in cases]


def test_the_scans_of_a_patient_stay_together():
    cases = scans("P1-000", "P1-001", "P2-000", "P3-000", "P3-001", "P3-002", "P4-000")
    for seed in range(20):
        train, validation = split_cases(cases, validation_fraction=0.5, seed=seed)
        assert sorted(ids(train + validation)) == ids(cases)
        patients = [{case.patient for case in side} for side in (train, validation)]
        assert not patients[0] & patients[1] and len(patients[0]) == len(patients[1]) == 2
        assert ids(validation) == sorted(ids(validation))
    with pytest.raises(DataError, match="at least 2 patients and got 1"):
        split_cases(cases[:2], seed=0)


@pytest.mark.parametrize(("count", "folds"), [(4, 2), (7, 3), (10, 5), (5, 5), (11, 4)])
def test_folds_cover_everything_once(count, folds):
    cases = scans(*(f"P{number:02d}-000" for number in range(count)))
    splits = [fold(cases, folds=folds, number=number, seed=1) for number in range(folds)]
    held_out = [ids(validation) for _, validation in splits]
    assert sorted(itertools.chain(*held_out)) == ids(cases)
    assert max(map(len, held_out)) - min(map(len, held_out)) <= 1
    assert all(sorted(ids(train + validation)) == ids(cases) for train, validation in splits)
    assert all(side == sorted(side) for pair in splits for side in map(ids, pair))
    assert fold(cases[::-1], folds=folds, number=1, seed=1) == splits[1]
    others = {tuple(ids(fold(cases, folds=folds, number=0, seed=seed)[1])) for seed in range(20)}
    assert len(others) > 1


def test_a_fold_keeps_the_scans_of_a_patient_together():
    cases = scans("P1-000", "P1-001", "P2-000", "P3-000", "P3-001")
    for number in range(3):
        _, validation = fold(cases, folds=3, number=number, seed=0)
        assert len({case.patient for case in validation}) == 1
        assert len(validation) == sum(case.patient == validation[0].patient for case in cases)


@pytest.mark.parametrize(
    ("folds", "number", "sentence"),
    [
        (1, 0, "folds is 1 for 4 patients: choose a number from 2 to 4"),
        (5, 0, "folds is 5"),
        (2, 2, "fold is 2 of 2 folds"),
    ],
)
def test_bad_folds_are_reported(phantoms, folds, number, sentence):
    with pytest.raises(DataError, match=sentence):
        fold(phantoms, folds=folds, number=number, seed=0)


SPLIT = {"train": ["A", "B", "D"], "validation": ["C"], "test": ["E"]}


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_split_from_file_follows_the_file(tmp_path, suffix):
    path = tmp_path / f"split{suffix}"
    rows = [f"{id}, {split}" for split, names in SPLIT.items() for id in names]
    path.write_text(json.dumps(SPLIT) if suffix == ".json" else "\ufeffid,split\n" + "\n".join(rows))
    train, validation = split_from_file(scans(*"EDCBA"), path)
    assert (ids(train), ids(validation)) == (["A", "B", "D"], ["C"])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({**SPLIT, "test": ["E", "X"]}, r"lists case X, which the data folder does not have: remove or correct"),
        ({**SPLIT, "test": ["E", "A"]}, r"lists case A twice, in train and in test: list it once"),
        ({**SPLIT, "train": ["A", "B", "D", "D"]}, r"lists case D twice"),
        ({**SPLIT, "test": []}, r"does not list case E: add it to one of train, validation, test"),
        ({**SPLIT, "holdout": []}, None),
        ({**SPLIT, "holdout": ["E"], "test": []}, r"names the split 'holdout': call it one of train, validation, test"),
        ({"train": [*"ABCD"], "test": ["E"]}, r"leaves validation empty"),
        ({"validation": [*"ABCD"], "test": ["E"]}, r"leaves train empty"),
        ({"train": "ABCDE"}, r"does not have the form"),
        (["A"], r"does not have the form"),
    ],
)
def test_bad_split_files_are_reported(tmp_path, content, sentence):
    path = tmp_path / "split.json"
    path.write_text(json.dumps(content))
    if sentence is None:  # an empty split is valid
        split_from_file(scans(*"ABCDE"), path)
        return
    with pytest.raises(DataError, match=rf"split\.json {sentence}"):
        split_from_file(scans(*"ABCDE"), path)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("split.json", "{", r"split\.json is not JSON"),
        ("split.csv", "case,split\nA,train", r"split\.csv has the columns case, split: it needs id and split"),
        ("split.csv", "id,split\nA", r"split\.csv names the split ''"),
        ("split.txt", "A", r"split\.txt is neither \.json nor \.csv"),
        ("split.json", None, r"split\.json cannot be read"),
    ],
)
def test_unreadable_split_files_are_reported(tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=sentence):
        split_from_file(scans("A", "B"), tmp_path / name)


def test_a_split_file_must_keep_a_patient_together(tmp_path):
    (tmp_path / "split.json").write_text(json.dumps({"train": ["P1-000", "P2-000"], "validation": ["P1-001"]}))
    with pytest.raises(DataError, match="puts the scans of patient P1 into train and validation: keep them together"):
        split_from_file(scans("P1-000", "P1-001", "P2-000"), tmp_path / "split.json")


def test_bad_splits_are_reported(phantoms):
    with pytest.raises(DataError, match="got 1"):
        split_cases(phantoms[:1], seed=0)
    with pytest.raises(DataError, match=r"validation_fraction is 1\.5"):
        split_cases(phantoms, validation_fraction=1.5, seed=0)
