"""Own records: templates over the columns of a table."""

import pytest

from memsave.config import ConfigError
from memsave.data import DataError
from memsave.data.text.own_records import OwnRecordsData
from memsave.data.text.records import Record

CSV = "name,text,age\nAda,a doctor,40\nBob,a baker,50\nCleo,a cook,60\n"
TEMPLATES = {"prompt": "{name} is", "completion": "{text}"}


def data(folder, text=CSV, name="a.csv", **options):
    (folder / name).write_text(text)
    found = OwnRecordsData(root=str(folder / name), **{**TEMPLATES, **options})
    found.validate()
    return found


def test_templates_are_filled_and_every_row_is_used(tmp_path):
    training, held_out = data(tmp_path).splits()
    assert sorted(training + held_out, key=lambda each: each.prompt) == [
        Record("Ada is", "a doctor"),
        Record("Bob is", "a baker"),
        Record("Cleo is", "a cook"),
    ]
    assert training
    assert held_out


def test_a_held_out_file_is_used(tmp_path):
    (tmp_path / "b.csv").write_text("name,text\nDan,a poet\n")
    training, held_out = data(tmp_path, held_out=str(tmp_path / "b.csv")).splits()
    assert len(training) == 3
    assert held_out == [Record("Dan is", "a poet")]


def test_braces_and_several_columns(tmp_path):
    found = data(tmp_path, completion="{{{text}}}, {age}")
    assert {each.completion for part in found.splits() for each in part} >= {"{a baker}, 50"}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{name", "data.prompt is '{name', which is no template"),
        ("name}", "which is no template"),
        ("{} is", "give the name of a column in each pair of braces"),
        ("{name:>9}", "give the name of a column alone"),
        ("{name!r}", "give the name of a column alone"),
    ],
)
def test_templates_that_cannot_be_read_are_refused(tmp_path, template, message):
    with pytest.raises(ConfigError, match=message):
        data(tmp_path, prompt=template)


@pytest.mark.parametrize("template", ["{name.upper}", "{name[0]}", "{nam}"])
def test_a_field_is_the_name_of_a_column_and_nothing_else(tmp_path, template):
    with pytest.raises(
        DataError, match=r"a\.csv has no column nam.*its columns are name, text, age \(did you mean name\?\)"
    ):
        data(tmp_path, prompt=template).splits()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"completion": "text"}, "data.completion is 'text', which names no column"),
        ({"encoding": "utf9"}, "data.encoding is 'utf9', which is unknown"),
    ],
)
def test_options_that_are_not_valid_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        data(tmp_path, **options)


def test_the_file_must_be_named():
    with pytest.raises(ConfigError, match=r"data\.root is not given; name the file"):
        OwnRecordsData().validate()


def test_empty_texts_are_refused_with_their_line(tmp_path):
    with pytest.raises(
        DataError, match=r"a\.csv, line 3, gives an empty data\.completion: fill in text, or delete the line"
    ):
        data(tmp_path, "name,text\nAda,x\nBob, \n").splits()
    with pytest.raises(DataError, match=r"a\.jsonl, line 1, gives an empty data\.prompt: fill in name"):
        data(tmp_path, '{"name": null, "text": "x"}\n', "a.jsonl", prompt="{name}").splits()
