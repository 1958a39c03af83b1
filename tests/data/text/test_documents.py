"""Documents: files, tables and chunks."""

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsave.config import ConfigError
from memsave.data import DataError
from memsave.data.text.collate import IGNORED
from memsave.data.text.documents import DocumentsData, chunks


def data(root, **options):
    found = DocumentsData(root=str(root), **options)
    found.validate()
    return found


def texts(found):
    return [sorted(each.text for each in part) for part in found.splits()]


@given(st.lists(st.integers(2, 9), min_size=1), st.integers(2, 8))
def test_chunks_predict_every_token_once_from_the_token_before(tokens, max_length):
    rows = chunks(tokens, start=1, max_length=max_length)
    assert [token for row in rows for token in row.ids[1:]] == tokens
    assert [row.ids[0] for row in rows] == [1, *(row.ids[-1] for row in rows[:-1])]
    assert all(1 < len(row.ids) <= max_length for row in rows)
    assert all(len(row.ids) == max_length for row in rows[:-1])
    assert all(row.labels == [IGNORED, *row.ids[1:]] for row in rows)


def test_a_folder_of_texts_is_read_with_its_subfolders(tmp_path):
    for name in ("a.txt", "sub/b.TXT", ".hidden.txt", ".git/c.txt", "d.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert sorted(chain(*texts(data(tmp_path)))) == ["a.txt", "sub/b.TXT"]
    (tmp_path / "sub" / "held").mkdir()
    assert texts(data(tmp_path / "a.txt", held_out=str(tmp_path / "sub"))) == [["a.txt"], ["sub/b.TXT"]]


def test_tables_and_folders_with_tables_are_read(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "dev.csv").write_text("text\nthree\n")
    assert texts(data(tmp_path)) == [["one", "two"], ["three"]]
    assert sorted(chain(*texts(data(tmp_path / "train.jsonl")))) == ["one", "two"]
    with pytest.raises(DataError, match=r"line 1, has no column body, which data.text names: its columns are text"):
        data(tmp_path / "train.jsonl", text="body").splits()


def test_equal_texts_stay_together(tmp_path):
    lines = [f'{{"text": "{number % 10}"}}\n' for number in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    training, held_out = texts(data(tmp_path / "a.jsonl", held_out_fraction=0.3))
    assert not set(training) & set(held_out)
    assert len(training) + len(held_out) == 40


def test_faults_are_reported(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.root is not given"):
        DocumentsData().validate()
    with pytest.raises(DataError, match=r"holds no train\.csv or train\.tsv or train\.jsonl"):
        data(tmp_path).splits()
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match="has a single example"):
        data(tmp_path).splits()
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"b\.txt is empty: delete it"):
        data(tmp_path).splits()
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"b\.txt, line 1, is not utf-8"):
        data(tmp_path).splits()
