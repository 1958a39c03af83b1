"""Tables: rows with their line numbers, and one sentence for each fault."""

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsave.config import ConfigError
from memsave.data import DataError
from memsave.data.text.tables import check_encoding, read_rows

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


def write(folder, name, text, encoding="utf-8"):
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


def rows(path, **options):
    return [(row.values, row.line) for row in read_rows(path, **options)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_csv_file_has_quotes_and_line_numbers(tmp_path, encoding, end):
    text = f'name,text{end}Ada,"a ""b"", c{end}d"{end}Bob,é{end}'
    found = rows(write(tmp_path, "a.csv", text, encoding), encoding=encoding.removesuffix("-sig"))
    assert found == [
        ({"name": "Ada", "text": f'a "b", c{end}d'}, 2),
        ({"name": "Bob", "text": "é"}, 4),
    ]


def test_quotes_in_a_tsv_file_have_no_meaning(tmp_path):
    assert rows(write(tmp_path, "a.tsv", 'a\tb\n"x\ty\n2"\tz\n')) == [
        ({"a": '"x', "b": "y"}, 2),
        ({"a": '2"', "b": "z"}, 3),
    ]


def test_jsonl_values_become_texts(tmp_path):
    line = {"a": " x ", "b": 1.5, "c": True, "d": None, "e": ["x"], "f": {}, "g": "line\u2028break"}
    path = write(tmp_path, "a.jsonl", json.dumps(line, ensure_ascii=False) + "\n\n")
    (row,) = read_rows(path)
    assert [row.text(each) for each in "abcdg"] == ["x", "1.5", "true", "", "line\u2028break"]
    with pytest.raises(DataError, match=r"a\.jsonl, line 1, has a list in the column e: give a text"):
        row.text("e")
    with pytest.raises(DataError, match=r"has an object in the column f"):
        row.text("f")


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1))
def test_what_the_csv_module_writes_is_read(tmp_path_factory, values):
    file = io.StringIO(newline="")
    csv.writer(file).writerows([("one", "other"), *values])
    path = write(tmp_path_factory.mktemp("csv"), "a.csv", file.getvalue())
    assert [tuple(row.values.values()) for row in read_rows(path)] == values


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "x", r"a\.txt is no table: give a file that ends in \.csv, \.tsv or \.jsonl"),
        ("a.csv", "", r"a\.csv has no rows"),
        ("a.csv", "a,b\n", r"a\.csv has no rows"),
        ("a.jsonl", "\n", r"a\.jsonl has no rows"),
        ("a.csv", "a,,b\n1,2,3\n", r"has no name for column 2 in its first line"),
        ("a.csv", "a,a\n1,2\n", r"names two columns a in its first line"),
        (
            "a.csv",
            "a,b\n1,2\n1,2,3\n",
            r"line 3, has 3 fields separated by a comma, and the first line names 2 columns: put",
        ),
        ("a.csv", "a,b\n1\n", r"line 2, has 1 field separated"),
        ("a.tsv", "a\tb\n1\n", r"line 2, has 1 field separated by a tab.*check its tabs"),
        ("a.csv", "a,b\n1,2\n\n3,4\n", r"line 3, is empty: delete it"),
        ("a.csv", 'a,b\n1,2\n"3,4\n', r"line 3, cannot be read .*check its double quotes"),
        ("a.csv", 'a,b\n1,"2"x\n', r"line 2, cannot be read .*check its double quotes"),
        ("a.jsonl", '{"a": 1}\nx\n', r"line 2, is not JSON .*give one JSON object per line"),
        ("a.jsonl", '{"a": 1}\n\n{"a": 1}\n', r"line 2, is empty: give one"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"line 2, is a JSON list: give one"),
        ("a.jsonl", "[" * 10**5 + "\n", r"line 1, is not JSON \(it is nested too deeply\)"),
        ("a.jsonl", "true\n", r"line 1, is a JSON boolean"),
        ("a.jsonl", "3\n", r"line 1, is a JSON number"),
    ],
)
def test_faults_are_named_with_their_line(tmp_path, name, text, message):
    with pytest.raises(DataError, match=message):
        read_rows(write(tmp_path, name, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.csv does not exist"):
        read_rows(tmp_path / "nothing.csv")


def test_a_missing_column_is_named_with_the_closest_one(tmp_path):
    (row,) = read_rows(write(tmp_path, "a.csv", "name,text\n1,2\n"))
    with pytest.raises(
        DataError, match=r"a\.csv has no column names: its columns are name, text \(did you mean name\?\)"
    ):
        row.text("names")
    first, other = read_rows(write(tmp_path, "a.jsonl", '{"a": 1}\n{"b": 1}\n'))
    assert first.text("a") == "1"
    with pytest.raises(DataError, match=r"a\.jsonl, line 2, has no column a: its columns are b"):
        other.text("a")


def test_half_of_a_character_is_refused(tmp_path):
    (row,) = read_rows(write(tmp_path, "a.jsonl", '{"a": "x\\ud800"}'))
    with pytest.raises(DataError, match=r"line 1, has half of a character"):
        row.text("a")


def test_a_wrong_encoding_is_named_with_its_line(tmp_path):
    path = write(tmp_path, "a.csv", "a,b\n1,2\nCafé,x\n", "latin-1")
    with pytest.raises(
        DataError, match=r"a\.csv, line 3, is not utf-8 \(byte 0xe9\): give its encoding, as in data\.encoding="
    ):
        read_rows(path)
    assert rows(path, encoding="latin-1")[1][0]["a"] == "Café"


@pytest.mark.parametrize("encoding", ["utf-9", "base64"])
def test_an_unknown_encoding_is_refused(encoding):
    with pytest.raises(ConfigError, match=f"data.encoding is '{encoding}', which is unknown"):
        check_encoding(encoding)
