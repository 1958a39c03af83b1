from pathlib import Path

import pytest

from memsave.data import DataError
from memsave.data.text.e2e import e2e_splits, read_e2e
from memsave.data.text.records import Record, references

REAL = Path(__file__).parents[4] / "shared" / "data" / "e2e"
real = pytest.mark.skipif(not (REAL / "devset.csv").is_file(), reason="the files of the E2E challenge are not here")
ROW = '"name[Blue Spice], near[the river]",A pub.\n'


def write(folder, name="devset.csv", text="mr,ref\n" + ROW, encoding="utf-8"):
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_rows_are_read_in_order_with_quotes_and_accents(tmp_path, encoding, end):
    text = f'"mr","ref"{end}"name[Café], near[a]","It is ""good"", £20."{end}name[B],B.{end}'
    assert read_e2e(write(tmp_path, text=text, encoding=encoding)) == [
        Record("name[Café], near[a]", 'It is "good", £20.'),
        Record("name[B]", "B."),
    ]


def test_columns_are_found_by_name(tmp_path):
    path = write(tmp_path, text="id,ref,mr\n7,A pub.,name[A]\n")
    assert read_e2e(path) == [Record("name[A]", "A pub.")]


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ("trainset devset testset_w_refs", ("trainset", "testset_w_refs")),
        ("trainset devset", ("trainset", "devset")),
        ("devset testset_w_refs", ("devset", "testset_w_refs")),
    ],
)
def test_the_splits_use_the_preferred_existing_files(tmp_path, present, expected):
    for name in present.split():
        write(tmp_path, f"{name}.csv", text=f"mr,ref\nname[{name}],A pub.\n")
    training, held_out = e2e_splits(tmp_path)
    assert (training[0].prompt, held_out[0].prompt) == tuple(f"name[{name}]" for name in expected)


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ("", r"holds neither trainset\.csv nor devset\.csv: put one"),
        ("testset_w_refs", r"holds neither trainset\.csv nor devset\.csv: put one"),
        ("devset", r"holds devset\.csv to train on and no held-out file: put testset_w_refs\.csv there"),
        ("trainset", r"no held-out file: put testset_w_refs\.csv or devset\.csv there"),
    ],
)
def test_missing_files_are_reported(tmp_path, present, message):
    for name in present.split():
        write(tmp_path, f"{name}.csv")
    with pytest.raises(DataError, match=message):
        e2e_splits(tmp_path)


def test_a_folder_or_file_that_does_not_exist_is_reported(tmp_path):
    with pytest.raises(DataError, match=r"data folder .*nowhere does not exist"):
        e2e_splits(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"nothing\.csv does not exist"):
        read_e2e(tmp_path / "nothing.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mr,text\n" + ROW, r"devset\.csv has no column ref: its first line"),
        ("", r"devset\.csv has no column mr or ref: its first line"),
        ("mr,ref\n", r"devset\.csv has a header but no rows"),
        (f"mr,ref\n{ROW}{ROW}  ,A pub.\n", r"devset\.csv, line 4, has an empty mr: fill it in"),
        (f'mr,ref\n{ROW}name[A],""\n', r"devset\.csv, line 3, has an empty ref: fill it in"),
        (f"mr,ref\n{ROW}name[A]\n", r"devset\.csv, line 3, has an empty ref: fill it in"),
        ("mr,ref\nname[A], near[B],A pub.\n", r"devset\.csv, line 2, has more fields than the header"),
        ('mr,ref\nname[A],"' + "x" * 200_000, r"devset\.csv is not a CSV file \(field larger"),
    ],
)
def test_unusable_files_are_reported(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_e2e(write(tmp_path, text=text))


def test_a_file_that_is_not_utf8_is_reported(tmp_path):
    path = write(tmp_path, text="mr,ref\nname[Café],A pub.\n", encoding="latin-1")
    with pytest.raises(DataError, match=r"devset\.csv is not UTF-8 \(byte 0xe9\): save it as UTF-8"):
        read_e2e(path)


@real
def test_the_files_of_the_challenge_are_complete_and_disjoint():
    assert len(read_e2e(REAL / "devset.csv")) == 4672
    assert len(read_e2e(REAL / "testset_w_refs.csv")) == 4693
    training, held_out = (references(records) for records in e2e_splits(REAL))
    assert not set(training) & set(held_out)
    assert (
        "A coffee shop in the city centre area called Blue Spice."
        in held_out["name[Blue Spice], eatType[coffee shop], area[city centre]"]
    )
