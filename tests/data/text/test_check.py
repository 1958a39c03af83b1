"""python -m memsave.data.check of texts: every fault, duplicates, cuts, and the table."""

import json
import re

import pytest

pytest.importorskip("transformers")

from memsave.config import ConfigError
from memsave.data.check import main
from memsave.data.errors import DataError, collecting_faults
from memsave.data.text.check import examine, source
from memsave.data.text.config import VisitsData
from memsave.data.text.own_records import OwnRecordsData
from memsave.tasks.language.small_gpt2 import SmallGPT2, small_gpt2, train_tokenizer
from tests.support.commands import run_command

RECORDS = ["data=records", "prompt={name} is", "completion={text}"]


@pytest.fixture
def check(capsys, tmp_path):
    """Run the command; returns (exit code, lines of the output, errors)."""

    def call(*arguments):
        code = main([str(each).replace("ROOT", str(tmp_path)) for each in arguments])
        told = capsys.readouterr()
        return code, told.out.splitlines(), told.err

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny model and its tokenizer of one byte per token."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([""], size=300)
    small_gpt2(SmallGPT2(layers=1, heads=1, width=4), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(path, *rows):
    path.write_text("".join(json.dumps({"name": name, "text": text}) + "\n" for name, text in rows))
    return path


def cells(lines, title):
    (row,) = [line for line in lines if line.startswith(f"{title} ")]
    return row.removeprefix(title).split()


def test_units_are_counted(check, tmp_path):
    write(tmp_path / "train.jsonl", ("Ada", "one"), ("Bob", "two"), ("Ada", "three"), ("Ada", "four"))
    write(tmp_path / "test.jsonl", ("Cy", "here"))
    code, lines, _ = check(*RECORDS, "data.root=ROOT", "unit=name")
    assert code == 0 and cells(lines, "units") == ["2", "1"]
    assert cells(lines, "records of a unit, longest") == ["3", "1"]


def test_correct_data_have_no_faults(check, tmp_path):
    write(tmp_path / "train.jsonl", ("Ada", "here"), ("Bob", "there"))
    write(tmp_path / "test.jsonl", ("Cy", "here"))
    code, lines, errors = check(*RECORDS, "data.root=ROOT")
    assert code == 0 and lines[-1] == "0 faults" and not errors
    assert cells(lines, "examples") == ["2", "1"] and not any(line.startswith("note") for line in lines)


def test_every_fault_of_both_files_is_reported(check, tmp_path):
    (tmp_path / "train.csv").write_text("name,text\nAda,here\nBob,\n,there\nCy,left, early\n\nDee,here\n")
    (tmp_path / "test.csv").write_bytes("name,text\nJosé,here\n".encode("latin-1"))
    code, lines, _ = check(*RECORDS, "root=ROOT")
    faults = lines[: lines.index(next(line for line in lines if line.startswith(" ")))]
    expected = ["line 5, has 3 fields", "line 6, is empty", "line 3, gives an empty data.completion"]
    expected += ["line 4, gives an empty data.prompt", "line 2, is not utf-8 (byte 0xe9)"]
    assert code == 2 and lines[-1] == "5 faults" and len(faults) == 5
    assert all(words in fault and fault.endswith(".") for words, fault in zip(expected, faults, strict=True))
    assert cells(lines, "examples") == ["2", "0"]
    code, lines, _ = check(*RECORDS, "root=ROOT", "show=1")
    assert lines[0] == faults[0] and lines[1] == "4 more faults are printed with show=5"


def test_a_missing_column_is_one_fault(check, tmp_path):
    (tmp_path / "a.csv").write_text("nom,text\n" + "Ada,here\n" * 50)
    code, lines, _ = check(*RECORDS, "root=ROOT/a.csv")
    assert code == 2 and lines[-1] == "2 faults"
    assert "has no column name, which data.prompt names" in lines[0]
    assert "has no example that can be used" in lines[1]


def test_copies_across_the_splits_are_a_fault_and_other_copies_are_notes(check, tmp_path):
    train = [("Ada", "here"), ("Ada", "here"), ("Bob", "there"), ("Bob", "here"), ("Ada", "here ")]
    write(tmp_path / "train.jsonl", *train)
    write(tmp_path / "test.jsonl", ("Ada", " here"), ("Ada", "gone"), ("Eve", "here"))
    code, lines, _ = check(*RECORDS, "root=ROOT")
    assert code == 2 and lines[-1] == "1 fault"
    assert lines[0].startswith("1 held-out example is also in the training data, such as 'Ada is' with 'here': remove")
    notes = [line for line in lines if line.startswith("note: ")]
    assert "1 held-out example is in the training data with another target, such as 'Ada is' with 'gone'." in notes[0]
    assert "3 training examples are not unique: 1 different one occurs up to 3 times, such as 'Ada is'" in notes[1]
    assert "epsilon is up to k times as large" in notes[1] and len(notes) == 2


def test_cut_examples_are_counted_with_their_tokens(check, tmp_path, model):
    write(tmp_path / "train.jsonl", ("A", "b" * 20), ("A", "b"), ("A", "b" * 6))  # 4 + 1 + n + 1 tokens each
    write(tmp_path / "test.jsonl", ("B", "b"))
    code, lines, errors = check(*RECORDS, "root=ROOT", f"model={model}", "max_length=12")
    assert code == 0, (lines, errors)
    assert cells(lines, "tokens, median") == ["12", "7"] and cells(lines, "tokens, longest") == ["26", "7"]
    assert cells(lines, "cut examples") == ["1", "0"] and cells(lines, "cut tokens") == ["14", "0"]
    (note,) = [line for line in lines if "max_length" in line]
    assert note == ("note: 1 of 3 training examples do not fit (max_length=12), which cuts 14 of 45 tokens (31.1%).")


def test_the_counts_are_those_of_training(model):
    from transformers import AutoTokenizer

    from memsave.data.text.encode import encode_records

    data = VisitsData(records=300, held_out=5, max_length=150)
    report = examine(data, model=str(model))
    _, cuts = encode_records(data.splits()[0], AutoTokenizer.from_pretrained(model), max_length=150)
    found = {title: train for title, train, _ in report.rows}
    assert cuts.cut_examples and (found["cut examples"], found["cut tokens"]) == (
        str(cuts.cut_examples),
        str(cuts.cut_tokens),
    )


def test_documents_are_cut_by_their_chunks_alone(check, tmp_path, model):
    for name in ("train", "test"):
        write(tmp_path / f"{name}.jsonl", ("A", name * 10))
    arguments = ["data=documents", "root=ROOT", f"model={model}", "max_length=12"]
    code, lines, errors = check(*arguments)
    assert code == 0 and cells(lines, "cut tokens") == ["0", "0"], errors
    _, lines, _ = check(*arguments, "max_chunks=2")
    assert cells(lines, "cut tokens") == [str(51 - 22), str(41 - 22)]


LABELLED = "text\tlabel\nbad food\tno\ngood food\tyes\nbad food\tno\nbad food\tyes\n"


def test_labels_are_counted_and_those_outside_the_set_named(check, tmp_path):
    (tmp_path / "train.tsv").write_text(LABELLED)
    (tmp_path / "dev.tsv").write_text("text\tlabel\ngood food\tyes\ngood food\tno\nx\tmaybe\n\tno\n")
    code, lines, _ = check("data=labelled", "root=ROOT")
    assert code == 2 and lines[-1] == "3 faults"
    assert "dev.tsv, line 5, has an empty text" in lines[0]
    assert "dev.tsv, line 4, has the label 'maybe', which is not one of no, yes" in lines[1]
    assert lines[2].startswith("1 held-out example is also in the training data, such as 'good food' with 'yes'")
    assert lines[3] == (
        "note: 1 held-out example is in the training data with another target, such as 'good food' with 'no'."
    )
    assert lines[4].startswith("note: 2 training examples are not unique: 1 different one occurs up to 2 times")
    assert lines[5] == "note: 1 training text occurs with different labels, such as 'bad food'."
    assert cells(lines, "examples") == ["4", "2"]
    assert cells(lines, "label no") == ["2", "(50%)", "1", "(50%)"]
    assert check("data=labelled", "root=ROOT")[1] == lines  # also if the files are read again
    (tmp_path / "dev.tsv").write_text("text\tlabel\nx\tmaybe\n")
    (tmp_path / "train.tsv").write_text("text\tlabel\n\tno\n")
    assert len(check("data=labelled", "root=ROOT")[1]) == 3  # an empty text, no example left, the number of faults
    _, lines, _ = check("data=labelled", "root=ROOT", "labels=[yes,no]")
    assert any("has the label 'maybe', which is not one of yes, no" in line for line in lines)


def test_content_with_faults_is_kept_from_training(tmp_path):
    (tmp_path / "train.tsv").write_text(LABELLED + "\tno\n")
    (tmp_path / "dev.tsv").write_text(LABELLED)
    data = source("labelled", {"root": str(tmp_path)})
    assert len(examine(data).faults) == 2
    with pytest.raises(DataError, match="line 6, has an empty text"):
        data.splits()


def test_skipped_lines_and_cut_texts_are_notes(check, tmp_path, model):
    header = "question1\tquestion2\tis_duplicate\n"
    (tmp_path / "train.tsv").write_text(header + "a b\tc\t0\nbroken\nlong text\td\t1\n")
    (tmp_path / "dev.tsv").write_text(header + "x\ty\t0\n")
    code, lines, _ = check("data=qqp", "root=ROOT", f"model={model}", "max_length=8")
    assert code == 0 and lines[0] == "note: 1 invalid lines are left out (skip_invalid)."
    assert cells(lines, "tokens, longest") == ["10", "2"] and cells(lines, "cut tokens") == ["2", "0"]
    assert cells(lines, "different texts") == ["2", "1"]


def test_dialogs_are_counted_with_their_turns_and_cut_replies(check, tmp_path, model):
    from memsave.data.text.encode_dialogs import encode_dialogs, format_of

    turns = "".join(f"{number} hello {number}\tgood day {number}\n" for number in range(2, 6))
    (tmp_path / "train.txt").write_text(f"1 your persona: i run.\n{turns}" * 2 + "1 no tab\n")
    (tmp_path / "test.txt").write_text("1 hi\tbye\n")
    code, lines, _ = check("data=personachat", "root=ROOT", f"model={model}", "max_length=70", "max_rows=1")
    assert code == 2 and "line 11, has no tab" in lines[0] and lines[-1] == "1 fault"
    assert "2 training examples are not unique" in lines[1]
    assert cells(lines, "turns, median") == ["8", "2"] and cells(lines, "cut examples") == ["2", "0"]
    from transformers import AutoTokenizer

    form = format_of(AutoTokenizer.from_pretrained(model))
    train = source("personachat", {"root": str(tmp_path / "test.txt"), "held_out": str(tmp_path / "test.txt")})
    (tmp_path / "test.txt").write_text(f"1 your persona: i run.\n{turns}" * 2)
    dialogs = train.splits()[0]
    whole, part = (encode_dialogs(dialogs, form, max_length=n, max_rows=1)[1].targets for n in (10**6, 70))
    assert cells(lines, "cut tokens") == [str(whole - part), "0"] and whole > part > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=rcords"], r"data=rcords is not known; choose one of .* \(did you mean records\?\)"),
        (["data=brats", "root=x"], r"data=brats is no source of text; for volumes, leave data= out"),
        (["data=records"], r"data\.root is not given"),
        (["data=records", "root=x", "max_lenght=9"], r"max_lenght is not known: the keys .*did you mean max_length\?"),
        (["data=records", "root=x", "max_length=many"], r"max_length is 'many': give a whole number, as in max_le"),
        (["data=records", "root=x", "max_length=3"], r"max_length is 3; it must be at least 8"),
        (["data=records", "root=x", "data.root=y"], r"root is given twice"),
        (["data=records", "root=x", "prompt={name}", "is"], r"'is' cannot be read: .* values with spaces need quotes"),
        (["data=records", "root=x", "prompt={name"], r"data\.prompt is '\{name', which is no template"),
        (["data=records", "root=x", "show=all"], r"show is 'all': give a number of faults"),
        (
            ["data=visits", "records=3", "held_out=2", "model=nowhere/x/y"],
            r"neither an existing folder nor a valid name",
        ),
        (["data=visits", "records=3", "held_out=2", "model=rev_unet"], r"model=rev_unet is no language model"),
    ],
)
def test_bad_arguments_are_named(check, arguments, message):
    code, lines, errors = check(*arguments)
    assert code == 2 and not lines
    assert re.search(message, errors) and errors.count("\n") == 1


def test_values_are_kept_as_typed():
    data = source("records", {"root": "007", "prompt": "{a}, [b] # ${c}", "separator": "null", "seed": "3"})
    assert (data.root, data.prompt, data.separator, data.seed) == ("007", "{a}, [b] # ${c}", None, 3)
    with pytest.raises(ConfigError, match="seed is -1"):
        source("records", {"root": "x", "seed": "-1"})


def test_faults_are_collected_only_inside_of_the_check(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("name,text\nAda,here\nBob,\nCy,there\n")
    data = OwnRecordsData(root=str(path), prompt="{name}", completion="{text}")
    with collecting_faults() as faults:
        assert sum(map(len, data.splits())) == 2
    assert len(faults) == 1
    with pytest.raises(DataError, match="line 3"):
        data.splits()


def test_the_command_checks_texts_with_data_and_volumes_without(tmp_path):
    write(tmp_path / "a.jsonl", ("Ada", "here"), ("Bob", "there"))
    done = run_command(tmp_path, *RECORDS, "root=a.jsonl", module="memsave.data.check")
    assert done.returncode == 0 and done.stdout.endswith("0 faults\n"), done.stderr
    assert main(["--help"]) == 0 and main(["root=nowhere"]) == 2
