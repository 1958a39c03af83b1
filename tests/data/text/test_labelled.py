"""Labelled files: columns, labels, splits, and one sentence for each fault."""

import json
from pathlib import Path

import pytest

from memsave.config import ConfigError
from memsave.data.errors import DataError
from memsave.data.text.labelled import LabelledData, MNLIData, QNLIData, QQPData, SST2Data

SHARED = Path(__file__).parents[4] / "shared" / "data"


def write(path, *lines):
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    return path


def read(root, **options):
    data = LabelledData(root=str(root), **options)
    data.validate()
    return data.label_names(), *data.splits()


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "train.tsv", "text\tlabel", "good\tpos", 'a "quote\tneg', "fine\tpos")
    write(tmp_path / "test.tsv", "text\tlabel", "unlabelled\tpos")
    write(tmp_path / "dev.tsv", "text\tlabel", "bad\tneg")
    return tmp_path


def test_a_folder_has_its_labels_sorted_and_prefers_dev(folder):
    names, train, held_out = read(folder)
    assert names == ["neg", "pos"]
    assert train == [("good", None, 1), ('a "quote', None, 0), ("fine", None, 1)]
    assert held_out == [("bad", None, 0)]
    assert read(folder, held_out=str(folder / "test.tsv"))[2] == [("unlabelled", None, 1)]
    assert read(folder, labels=["pos", "neg"])[1][0].label == 0


def test_numbers_are_sorted_as_numbers(tmp_path):
    write(tmp_path / "a.csv", "text,label", *(f'"text, {n}",{n}' for n in range(12)))
    assert read(tmp_path / "a.csv")[0] == [str(n) for n in range(12)]


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl"])
def test_formats_give_the_same_pairs(tmp_path, suffix):
    rows = [{"q": f"q{n}", "s": f"s {n}", "y": n % 2} for n in range(40)]
    path = tmp_path / f"pairs.{suffix}"
    if suffix == "jsonl":
        write(path, *map(json.dumps, rows))
    else:
        separator = "\t" if suffix == "tsv" else ","
        write(path, *(separator.join(map(str, each)) for each in (rows[0], *(row.values() for row in rows))))
    names, train, held_out = read(path, text="q", pair="s", label="y", held_out_fraction=0.25)
    assert names == ["0", "1"]
    assert sorted([*train, *held_out]) == sorted((row["q"], row["s"], row["y"]) for row in rows)
    assert 2 <= len(held_out) <= 20
    assert read(path, text="q", pair="s", label="y", held_out_fraction=0.25)[2] == held_out


def test_a_changed_file_is_read_again(folder):
    data = LabelledData(root=str(folder))
    assert len(data.splits()[0]) == 3
    write(folder / "train.tsv", "text\tlabel", "good\tpos", "worse\tneg", "fine\tpos", "last\tneg")
    assert len(data.splits()[0]) == 4


@pytest.mark.parametrize(
    ("lines", "options", "words"),
    [
        (["text\tlabel", "a\t1", "b\t0"], {"label": "lable"}, r"no column lable.*did you mean label\?.*data.label="),
        (["text\tlabel", "a\t1", "b\t0"], {"pair": "second"}, "no column second: .*data.pair="),
        (["text\tlabel", "a\t1", " \t0"], {}, r"line 3, has an empty text"),
        (["text\tlabel", "a\t1", "b\t"], {}, r"line 3, has an empty label"),
        (["text\tlabel", "a\t1", "b\tc\t0"], {}, r"line 3, has 3 fields"),
        (["text\tlabel", "a\t1", "b\t1"], {}, "single label '1' in the column label"),
        (["text\tlabel", "a\t1", "b\t2"], {"labels": ["1", "0"]}, "line 3, has the label '2', .* one of 1, 0"),
        (["text\tlabel"], {}, "no rows"),
        ([], {}, "no rows"),
        (["text\tlabel", "a\t1", "b\t0"], {"held_out": "nowhere.tsv"}, "nowhere.tsv does not exist"),
        (["text\tlabel", *(f"a\t{n}" for n in range(1001))], {}, "1001 different labels, and the limit is 1000"),
    ],
)
def test_a_fault_gives_one_sentence(tmp_path, lines, options, words):
    with pytest.raises(DataError, match=words) as error:
        read(write(tmp_path / "train.tsv", *lines), **options)
    assert "\n" not in str(error.value)


def test_a_label_of_the_held_out_file_must_be_known(folder):
    write(folder / "dev.tsv", "text\tlabel", "bad\tneutral")
    with pytest.raises(DataError, match=r"dev.tsv, line 2, has the label 'neutral'"):
        read(folder)


def test_an_encoding_is_named_with_its_line(folder):
    (folder / "train.tsv").write_bytes("text\tlabel\ngood\tpos\nschön\tneg\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"train.tsv, line 3, is not utf-8"):
        read(folder)
    (folder / "dev.tsv").write_bytes(b"text\tlabel\nbad\tneg\n")
    assert read(folder, encoding="latin-1")[1][1].text == "schön"


@pytest.mark.parametrize(
    ("options", "words"),
    [({}, "data.root is not given"), ({"root": "a", "labels": ["x"]}, "at least two different labels")],
)
def test_wrong_options_give_one_sentence(options, words):
    with pytest.raises(ConfigError, match=words):
        LabelledData(**options).validate()


def test_qqp_skips_broken_lines_and_counts_them(tmp_path):
    header = "id\tquestion1\tquestion2\tis_duplicate"
    write(tmp_path / "train.tsv", header, "1\ta?\tb?\t0", "broken", "2\tc?\t\t1", "3\tc?\td?\t1")
    write(tmp_path / "dev.tsv", header, "4\te?\tf?\t1")
    data = QQPData(root=str(tmp_path))
    assert data.splits()[0] == [("a?", "b?", 0), ("c?", "d?", 1)]
    assert data.skipped == 2
    write(tmp_path / "dev.tsv", header, "broken")
    with pytest.raises(DataError, match=r"dev.tsv has no valid line, as in: .*dev.tsv, line 2, has 1 field"):
        data.splits()


def test_mnli_takes_the_matched_part(tmp_path):
    header = "index\tsentence1\tsentence2\tlabel1\tgold_label"
    labels = ("neutral", "entailment", "contradiction")
    write(tmp_path / "train.tsv", header, *(f"{n}\ta {n}\tb\tx\t{label}" for n, label in enumerate(labels)))
    write(tmp_path / "dev_matched.tsv", header, "0\tone\ttwo\tx\tneutral")
    write(tmp_path / "test_matched.tsv", header, "0\tone\ttwo\tx\tneutral")
    data = MNLIData(root=str(tmp_path))
    assert data.label_names() == sorted(labels)
    assert data.splits()[1] == [("one", "two", 2)]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data of GLUE are not here")
def test_glue_is_read_whole():
    data = SST2Data(root=str(SHARED / "sst2"))
    assert [len(each) for each in data.splits()] == [60614, 6735]
    data = QNLIData(root=str(SHARED / "qnli"))
    assert [len(each) for each in data.splits()] == [4000, 800]
    assert data.label_names() == ["entailment", "not_entailment"]
