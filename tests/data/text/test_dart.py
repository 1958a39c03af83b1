"""DART: triples in the form of the paper's code, one record for each text."""

import json

import pytest

from memsave.config import ConfigError
from memsave.data import DataError
from memsave.data.text.dart import DartData, read_dart
from memsave.data.text.records import Record, references

ENTRY = {
    "tripleset": [["Mars Hill College", "JOINED", "1973"], ["Mars Hill College", "LOCATION", "Mars Hill"]],
    "subtree_was_extended": True,
    "annotations": [{"source": "a", "text": "A school. "}, {"source": "b", "text": "A college."}],
}
PROMPT = "Mars Hill College : joined : 1973 | Mars Hill College : location : Mars Hill"


def write(folder, content, part="train"):
    path = folder / f"dart-v1.1.1-full-{part}.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_each_text_is_a_record(tmp_path):
    found = read_dart(write(tmp_path, [ENTRY]))
    assert found == [Record(PROMPT, "A school."), Record(PROMPT, "A college.")]
    assert references(found) == {PROMPT: ["A school.", "A college."]}


@pytest.mark.parametrize(("parts", "held_out"), [("train dev test", "test"), ("train dev", "dev")])
def test_the_files_are_found_by_name(tmp_path, parts, held_out):
    for part in parts.split():
        write(tmp_path, [{**ENTRY, "annotations": [{"text": part}]}], part)
    found = DartData(root=str(tmp_path)).splits()
    assert [each[0].completion for each in found] == ["train", held_out]


def test_missing_and_double_files_are_reported(tmp_path):
    data = DartData(root=str(tmp_path))
    with pytest.raises(DataError, match=r"holds no \*train\*\.json: put the file"):
        data.splits()
    write(tmp_path, [ENTRY])
    with pytest.raises(DataError, match=r"holds no \*test\*\.json or \*dev\*\.json"):
        data.splits()
    (tmp_path / "train.json").touch()
    with pytest.raises(DataError, match=r"holds dart-v1\.1\.1-full-train\.json and train\.json: leave the file"):
        data.splits()
    with pytest.raises(DataError, match="nowhere does not exist"):
        DartData(root=str(tmp_path / "nowhere")).splits()
    with pytest.raises(ConfigError, match=r"data\.root is not given"):
        DartData().validate()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", r"train\.json is not JSON"),
        ({}, r"is not a JSON list of entries"),
        ([], r"is not a JSON list of entries"),
        ([ENTRY, 3], r"entry 2, has no tripleset"),
        ([{**ENTRY, "tripleset": [["a", "b"]]}], r"entry 1, has no tripleset"),
        ([{**ENTRY, "annotations": []}], r"entry 1, has no annotations"),
        ([{**ENTRY, "annotations": [{"text": " "}]}], r'entry 1, has an annotation without "text"'),
    ],
)
def test_faults_are_named_with_their_entry(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read_dart(write(tmp_path, content))
