"""Atomic writes: the old content stays until the new content is complete."""

import json

import pytest

from memsave import files
from memsave.files import create_folder, newest_folder, replace_folder, replacing, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_replacing_keeps_the_old_file_and_deletes_the_draft_on_an_error(tmp_path):
    path = tmp_path / "scan.nii.gz"
    path.write_text("old")
    with pytest.raises(OSError), replacing(path) as draft:
        assert draft.name.endswith(".nii.gz")
        draft.write_text("ne")
        raise OSError("no space")
    assert path.read_text() == "old" and names(tmp_path) == ["scan.nii.gz"]


def test_write_json_replaces_the_file(tmp_path):
    for content in ({"b": 1, "a": 2}, [3]):
        write_json(tmp_path / "result.json", content)
        assert json.loads((tmp_path / "result.json").read_text()) == content
    assert names(tmp_path) == ["result.json"]


def test_a_draft_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    """Otherwise a power cut can leave an empty file under the name."""
    flushed = []
    monkeypatch.setattr(files, "flush", lambda path: flushed.append((path.name, (tmp_path / "made").exists())))
    write_json(tmp_path / "made", 1)
    assert flushed == [(".new.made", False), (tmp_path.name, True)]
    (tmp_path / "made").unlink()
    flushed.clear()

    def write(draft):
        draft.mkdir()
        (draft / "weights").write_text("1")

    create_folder(tmp_path / "made", write)
    assert flushed[0] == ("weights", False) and not any(done for _, done in flushed)


def test_create_folder_keeps_the_folder_of_a_faster_process(tmp_path):
    def write(draft):
        draft.mkdir()
        (draft / "file").write_text("slow")
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "file").write_text("fast")

    create_folder(tmp_path / "made", write)
    assert (tmp_path / "made" / "file").read_text() == "fast" and names(tmp_path) == ["made"]


def test_replace_folder_keeps_the_previous_one(tmp_path):
    folder = tmp_path / "checkpoint"
    for content in "abc":
        replace_folder(folder, lambda draft, content=content: (draft / "file").write_text(content))
    assert names(tmp_path) == ["checkpoint", "checkpoint.previous"]
    assert [(tmp_path / name / "file").read_text() for name in names(tmp_path)] == ["c", "b"]


def test_newest_folder_finds_the_previous_one_between_the_two_renames(tmp_path):
    folder = tmp_path / "checkpoint"
    assert newest_folder(folder) == folder
    (tmp_path / "checkpoint.previous").mkdir()
    assert newest_folder(folder) == tmp_path / "checkpoint.previous"
    folder.mkdir()
    assert newest_folder(folder) == folder
