"""Patients of cases by data.unit: of the layout, by a pattern of ids, and from a table; splits keep them together."""

import pytest

from memsave.config import ConfigError
from memsave.config.compose import compose
from memsave.data import DataError
from memsave.data.volumes.config import SegmentationData
from memsave.data.volumes.layouts import Case, find_cases
from memsave.data.volumes.patients import with_patients
from tests.support.volume_files import brats


def cases(*ids, patient=None):
    return [Case(id, (), None, patient=patient) for id in ids]


def patients(found):
    return [each.patient for each in found]


def test_a_pattern_of_the_whole_id():
    found = cases("hospital1_p07_t1", "hospital1_p07_t2", "hospital2_p07_t1")
    assert patients(with_patients(found, r"(.+_p\d+)_t\d")) == ["hospital1_p07"] * 2 + ["hospital2_p07"]
    with pytest.raises(DataError, match=r"data\.unit=\(p\\d\+\) finds no patient in the id of case hospital1_p07_t1"):
        with_patients(found, r"(p\d+)")


def test_the_layout_knows_the_patients_of_brats_2023(tmp_path):
    for id in ("BraTS-GLI-00005-100", "BraTS-GLI-00005-101", "BraTS-GLI-00006-100"):
        brats(tmp_path, id, separator="-", parts=("t1n", "t1c", "t2w", "t2f"))
    found = find_cases(tmp_path, "brats2023")
    five, six = "BraTS-GLI-00005", "BraTS-GLI-00006"
    assert patients(with_patients(found, "patient")) == [five, five, six]
    assert patients(with_patients(found, r"BraTS-GLI-(\d+)-\d+")) == ["00005", "00005", "00006"]
    with pytest.raises(DataError, match=r"and A does not in this data\.layout: give a regular expression or a table"):
        with_patients(cases("A", "B"), "patient")


@pytest.mark.parametrize("name", ["patients.csv", "patients.tsv"])
def test_a_table(tmp_path, name):
    path = tmp_path / name
    lines = ["case,patient,sex", "A,1,f", "B,2,m", "C,1,f", "elsewhere,3,f"]
    path.write_text("\n".join(lines).replace(",", "\t" if name.endswith("tsv") else ","))
    assert patients(with_patients(cases("A", "B", "C"), str(path))) == ["1", "2", "1"]
    with pytest.raises(DataError, match=r"lists no patient of case D \(data\.unit\): add a line"):
        with_patients(cases("A", "D"), str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,patient\nA,1\n", r"has no column case, which data\.unit names: its columns are id, patient"),
        ("case,patient\nA,\n", r"line 2, has an empty patient: fill it in"),
        ("case,patient\nA,1\nA,2\n", r"line 3, gives case A the patient 2, and an earlier line 1"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        with_patients(cases("A"), str(tmp_path / "a.csv"))


def test_splits_and_folds_keep_patients_together():
    found = cases(*(f"p{number // 3}_s{number % 3}" for number in range(30)))
    data = SegmentationData(unit=r"(p\d+)_s\d")
    chosen = data.patients(found)
    assert len({each.patient for each in chosen}) == 10 and data.unit != SegmentationData().unit
    assert SegmentationData().patients(found) == found
    for settings in ({}, {"folds": 5, "fold": 2}):
        train, held_out = SegmentationData(unit=data.unit, **settings).split(chosen)
        assert len(train) + len(held_out) == 30 and len(held_out) % 3 == 0 and held_out
        assert not set(patients(train)) & set(patients(held_out))


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        ("'(p'", r"data\.unit is '\(p', which is no regular expression"),
        ("p1", r"data\.unit is 'p1', which has 0 groups; give patient, a regular expression with one group such as"),
        (r"'(p)(\d)'", "which has 2 groups"),
    ],
)
def test_units_without_one_group_are_refused(unit, message):
    with pytest.raises(ConfigError, match=message):
        compose(["experiment=brats_rev", f"data.unit={unit}"])
