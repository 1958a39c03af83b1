"""python -m memsave.generate: inputs and outputs, lines that cannot be used, interruptions, and refusals."""

import csv
import json
import re
import shutil
import time

import pytest
import torch

pytest.importorskip("transformers")

from memsave.config.registry import component
from memsave.data.text.config import VisitsData
from memsave.data.text.documents import Document, DocumentsData
from memsave.data.text.own_records import OwnRecordsData
from memsave.data.text.tables import read_rows
from memsave.generate import main
from memsave.tasks.language.answering import TextAnswerer, load_answerer
from memsave.tasks.language.documents import Documents
from memsave.tasks.language.generation import GenerationConfig
from tests.support.commands import Command
from tests.support.released_texts import KNOWN, PEOPLE, PROMPT, model_of, task_of, tokenizer_of


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """(a run's folder with `model/`, its task, its model) of one's own records."""
    tokenizer = tokenizer_of()
    data = OwnRecordsData(prompt=PROMPT, completion="{text}", max_length=40)
    task, model, folder = task_of(data, tokenizer), model_of(tokenizer), tmp_path_factory.mktemp("run")
    task.release(model, folder / "model")
    return folder, task, model


@pytest.fixture
def generate(released, tmp_path, capsys):
    """Run the command with an input of this name and content; returns (exit code, rows of the output, errors)."""

    def call(name, text, *arguments, output="out.jsonl", model=None):
        if text is not None:
            (tmp_path / name).write_text(text)
        files = [f"input={tmp_path / name}", f"output={tmp_path / output}", "device=cpu"]
        code = main([f"model={model or released[0]}", *files, *arguments])
        told = capsys.readouterr()
        return code, rows_of(tmp_path / output), " ".join(told.err.split())

    return call


def change(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def plant_code(folder, name, auto_class):
    """Name a class of a file in the folder, as models with code of their own do; the file makes another one."""
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    change(folder / name, auto_map={auto_class: ["evil.Evil", "evil.Evil"] if "Token" in auto_class else "evil.Evil"})
    if auto_class == "AutoConfig":
        change(folder / name, model_type="unheard_of")


def rows_of(path):
    if not path.exists():
        return None
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(rows):
    return [each["generated"] for each in rows]


JSONL = "".join(json.dumps({"name": name, "age": age}) + "\n" for name, age in PEOPLE)
CSV = "age,name,note\n" + "".join(f'{age},{name},"a, b"\n' for name, age in PEOPLE)
TXT = "".join(f"{name} ({age}):\n" for name, age in PEOPLE)
TSV = CSV.replace('"a, b"', "x").replace(",", "\t")


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", JSONL), ("a.csv", CSV), ("a.txt", TXT), ("a.tsv", TSV)])
def test_every_format_gives_the_texts_of_the_evaluation(generate, released, name, text):
    _, task, model = released
    expected = task.write(model, [each.strip() for each in TXT.splitlines()])
    code, rows, errors = generate(name, text)
    assert code == 0 and "answered 5 of 5 lines" in errors
    assert texts(rows) == list(expected.values()) and len(set(texts(rows))) > 2
    first = 1 if name.endswith((".jsonl", ".txt")) else 2
    assert [row["line"] for row in rows] == list(range(first, first + 5))
    columns = {".jsonl": ["name", "age"], ".csv": ["age", "name", "note"], ".txt": ["prompt"]}
    assert list(rows[0]) == ["line", *columns.get(name[1:], ["age", "name", "note"]), "generated"]


def test_a_column_prompt_is_a_whole_prompt_only_without_the_columns_of_the_template(generate):
    _, expected, _ = generate("a.jsonl", JSONL)
    whole = "".join(json.dumps({"prompt": f"{name} ({age}):"}) + "\n" for name, age in PEOPLE)
    assert texts(generate("b.jsonl", whole, output="b.jsonl.jsonl")[1]) == texts(expected)
    both = "".join(json.dumps({"prompt": "x", "name": name, "age": age}) + "\n" for name, age in PEOPLE)
    assert texts(generate("c.jsonl", both, output="c.csv")[1]) == texts(expected)


def test_a_plain_line_is_a_whole_prompt(generate, released, tmp_path):
    folder = shutil.copytree(released[0], tmp_path / "copy")
    path = folder / "model" / "prompt.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "template": "Q: {prompt}"}))
    _, task, model = released
    expected = {each: task.write(model, [each])[each] for each in ("Ada", "Q: Ada")}  # a batch shares its length
    assert texts(generate("a.txt", "Ada\n", model=folder)[1]) == [expected["Ada"]]
    assert texts(generate("a.csv", "prompt\nAda\n", model=folder, output="b.csv")[1]) == [expected["Q: Ada"]]
    assert len(set(expected.values())) == 2


def test_a_csv_output_has_the_same_cells(generate):
    _, expected, _ = generate("a.csv", CSV)
    _, rows, _ = generate("a.csv", CSV, output="out.csv")
    assert rows == [{key: str(value) for key, value in row.items()} for row in expected]
    nested = json.dumps({"name": "Ada", "age": 36, "tags": ["x", {"y": 1}], "half": "\ud800"})
    code, rows, _ = generate("b.jsonl", nested + "\n", output="b.csv")
    assert code == 0 and json.loads(rows[0]["tags"]) == ["x", {"y": 1}]
    code, rows, _ = generate("b.jsonl", nested + "\n", output="b2.jsonl")
    assert code == 0 and rows[0]["half"] == "\ud800"


def test_lines_that_cannot_be_used_are_named_and_left_out(generate, released, tmp_path):
    lines = JSONL.splitlines()
    bad = ["no json", '{"name": "Ada"}', '{"name": "", "age": null}', '{"name": ["x"], "age": 1}']
    bad.append(json.dumps({"name": "long " * 50, "age": 1}))
    mixed = [lines[0], *bad[:2], lines[1], *bad[2:], *lines[2:]]
    code, rows, errors = generate("a.jsonl", "\n".join(mixed))
    assert code == 1 and [row["line"] for row in rows] == [1, 4, 8, 9, 10] and "answered 5 of 10 lines" in errors
    assert texts(rows) == texts(generate("b.jsonl", JSONL, output="b.csv")[1])
    for words in (
        "left out: .*line 2, is not JSON",
        "line 3, has no column age, which data.prompt names",
        "line 5, gives an empty data.prompt",
        "line 6, has a list in the column name",
        r"line 7, has a prompt of \d+ tokens: the model takes at most 38; shorten it",
    ):
        assert re.search(words, errors), words
    assert errors.count("left out") == 5 and not (tmp_path / "out.jsonl.partial.jsonl").exists()
    code, rows, errors = generate("c.jsonl", "\n".join(bad), output="none.jsonl")
    assert code == 2 and rows is None and "c.jsonl has no line that can be used: " in errors


def test_the_longest_prompt_is_that_of_training(released, tmp_path):
    folder, task, _ = released
    answerer = load_answerer(folder, device=torch.device("cpu"))
    read = []
    for count in range(60):
        (tmp_path / "a.txt").write_text("a" * (count + 1) + "\n")
        (row,) = read_rows(tmp_path / "a.txt", plain="prompt")
        try:
            tokens = answerer.read(row)
        except ValueError:
            continue
        assert tokens == task.encode_prompt(row.values["prompt"])
        read.append(len(tokens))
    assert max(read) == 38


class Interrupted(TextAnswerer):
    """An answerer that is interrupted in its third batch."""

    left = 2

    def answer(self, inputs):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return super().answer(inputs)


@pytest.mark.parametrize("torn", [*(pytest.param(each, marks=pytest.mark.slow) for each in (0, 25)), 1, 10**6])
def test_an_interrupted_command_continues_with_equal_answers(generate, tmp_path, monkeypatch, torn):
    _, expected, _ = generate("a.jsonl", JSONL, "batch_size=2", output="whole.jsonl")
    partial = tmp_path / "out.jsonl.partial.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(GenerationConfig, "answerer", lambda self, *parts, **known: Interrupted(*parts, **known))
        code, rows, errors = generate("a.jsonl", None, "batch_size=2")
    assert code == 130 and rows is None and "the same command continues" in errors
    content = partial.read_bytes()
    assert content.count(b"\n") == 5
    partial.write_bytes(content[: max(0, len(content) - torn)])  # as after kill -9 while a line was written
    with monkeypatch.context() as patch:
        patch.setattr("memsave.generate.write_table", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        code, _, errors = generate("a.jsonl", None, "batch_size=2")
    assert code == 130 and ("continuing after" in errors) == (torn < 10**6)
    code, rows, errors = generate("a.jsonl", None, "batch_size=2")
    assert code == 0 and rows == expected and not partial.exists()
    assert "continuing after 5 of 5 lines" in errors


def test_every_end_of_the_journal_gives_the_same_answers(generate, tmp_path, monkeypatch):
    _, expected, _ = generate("a.jsonl", JSONL, "batch_size=2", output="whole.jsonl")
    asked = []
    answer = TextAnswerer.answer
    monkeypatch.setattr(TextAnswerer, "answer", lambda self, inputs: asked.append(len(inputs)) or answer(self, inputs))
    with monkeypatch.context() as patch:
        patch.setattr("memsave.generate.write_table", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert generate("a.jsonl", None, "batch_size=2")[0] == 130
    partial = tmp_path / "out.jsonl.partial.jsonl"
    lines = partial.read_text().splitlines(keepends=True)
    assert len(lines) == 6
    for count in range(6):
        asked.clear()
        partial.write_text("".join(lines[: count + 1]))
        assert generate("a.jsonl", None, "batch_size=2")[1] == expected
        assert sum(asked) == {0: 5, 1: 5, 2: 3, 3: 3, 4: 1, 5: 0}[count]  # the batch of the last answer is whole


def test_a_journal_of_another_input_or_model_is_refused(generate, released, tmp_path):
    partial = tmp_path / "out.jsonl.partial.jsonl"

    def interrupted(name="a.jsonl", text=JSONL, *arguments, model=None):
        return generate(name, text, *arguments, model=model)

    def keep(patched=KeyboardInterrupt):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("memsave.generate.write_table", lambda *_: (_ for _ in ()).throw(patched))
            assert interrupted()[0] == 130

    keep()
    other = shutil.copytree(released[0], tmp_path / "other")
    code, _, errors = interrupted(model=other)
    assert code == 0, errors  # a copy is the same model
    keep()
    model_of(released[1].tokenizer, seed=1).save_pretrained(other / "model")
    for refused in (
        interrupted("a.jsonl", JSONL.replace("Ada", "Adi")),
        interrupted("a.jsonl", JSONL, "batch_size=7"),
        interrupted("a.jsonl", JSONL, model=other),
    ):
        assert refused[0] == 2 and "another input, of another model or with another batch_size; delete it" in refused[2]
    for content in (b"x\n", b"[]\n3\n", b"\xff\xff\n"):
        partial.write_bytes(content)
        code, _, errors = interrupted()
        assert code == 2 and "partial.jsonl" in errors and "delete it, or give another output=" in errors
        assert partial.read_bytes() == content


def test_a_killed_command_continues(released, tmp_path):
    """kill -9 at any moment leaves a journal from which the same command continues."""
    (tmp_path / "a.jsonl").write_text(JSONL * 4)
    files = [f"model={released[0]}", f"input={tmp_path / 'a.jsonl'}", f"output={tmp_path / 'out.jsonl'}"]
    arguments = [*files, "batch_size=1", "device=cpu"]
    partial = tmp_path / "out.jsonl.partial.jsonl"
    running = Command(tmp_path, *arguments, module="memsave.generate")
    end = time.monotonic() + 120
    while running.process.is_alive() and time.monotonic() < end:
        if partial.exists() and partial.read_bytes().count(b"\n") > 3:
            break
        time.sleep(0.01)
    running.kill()
    done = partial.read_bytes().count(b"\n") - 1
    assert 0 < done < 20
    assert main(arguments) == 0
    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["line"] for row in rows] == list(range(1, 21))
    assert texts(rows) == texts(rows[:5]) * 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["input=/none.jsonl"], "The file /none.jsonl does not exist"),
        (["output=out.txt"], "output is out.txt; give a file that ends in .jsonl or .csv"),
        (["output=INPUT"], "which is the input; give another file"),
        (["output=FOLDER.csv"], "which is a folder; give a file"),
        (["output=INPUT/x/out.csv"], "cannot be read or written"),
        (["batch_size=0"], "batch_size is 0; it must be at least 1"),
        (["batch_size=many"], "batch_size is 'many': give a number of lines"),
        (["encoding=utf-9"], "encoding is 'utf-9', which is unknown"),
        (["encoding=utf-32"], "give its encoding, as in encoding=latin-1"),
        (["device=tpu"], "device"),
        (["model=/none"], "/none holds no prompt.json; give the folder of a run of a language task"),
        (["promt=x"], "promt is not known"),
    ],
)
def test_bad_arguments_are_named(released, tmp_path, capsys, arguments, words):
    source = tmp_path / "a.jsonl"
    source.write_text(JSONL + "\n")
    (tmp_path / "FOLDER.csv").mkdir()
    given = {"model": str(released[0]), "input": str(source), "output": str(tmp_path / "out.csv"), "device": "cpu"}
    for each in arguments:
        key, _, value = each.partition("=")
        given[key] = value.replace("INPUT", str(source)).replace("FOLDER", str(tmp_path / "FOLDER"))
    assert main([f"{key}={value}" for key, value in given.items()]) == 2
    errors = " ".join(capsys.readouterr().err.split())
    assert words in errors and "Traceback" not in errors and errors.startswith("memsave: ")


def test_a_missing_argument_is_named(capsys):
    assert main(["model=x"]) == 2
    assert "input is not given: give a file, as in input=/my/prompts.jsonl" in capsys.readouterr().err
    assert main([]) == 2 and main(["--help"]) == 0


def test_columns_of_the_output_are_refused_in_the_input(generate):
    for column in ("line", "generated"):
        row = json.dumps({"name": "Ada", "age": 3, column: 1})
        code, _, errors = generate("a.jsonl", row + "\n")
        assert code == 2 and f"the input has a column {column}, which the output adds; rename it" in errors


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "prompt.json").write_text("{"), "prompt.json cannot be read; copy the model's"),
        (lambda folder: (folder / "prompt.json").write_text("[]"), "prompt.json cannot be read; copy the model's"),
        (lambda folder: (folder / "prompt.json").write_text('{"task": "x"}'), "is of task=x, which cannot answer"),
        (lambda folder: (folder / "prompt.json").write_text('{"task": "segmentation"}'), "which cannot answer"),
        (lambda folder: (folder / "model.safetensors").write_text("x"), "cannot be loaded as a language model"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer that can be read"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"model": 1}'), "holds no tokenizer that can be read"),
        (lambda folder: (folder / "config.json").write_text("[" * 10**5), "it is nested too deeply"),
        (lambda folder: change(folder / "prompt.json", generate={"max_length": 10**30}), "max_length, which is 1000"),
        (lambda folder: change(folder / "prompt.json", max_prompt_tokens="9"), "max_prompt_tokens, which is '9'"),
        (lambda folder: change(folder / "prompt.json", prompt="{other}"), "has no usable 'other'; copy the model's"),
        (lambda folder: plant_code(folder, "config.json", "AutoConfig"), "cannot be loaded as a language model"),
        (lambda folder: plant_code(folder, "tokenizer_config.json", "AutoTokenizer"), None),
    ],
)
def test_a_damaged_model_is_named(generate, released, tmp_path, damage, words):
    folder = shutil.copytree(released[0] / "model", tmp_path / "copy")
    damage(folder)
    code, _, errors = generate("a.jsonl", JSONL, model=folder)
    assert code == (0 if words is None else 2) and (words or "") in errors
    assert not (folder / "ran").exists()


def test_models_without_a_template_read_the_column_prompt(tmp_path, capsys):
    tokenizer = tokenizer_of()
    task, model = task_of(VisitsData(max_length=40), tokenizer), model_of(tokenizer)
    task.release(model, tmp_path / "model")
    form = json.loads((tmp_path / "model" / "prompt.json").read_text())
    del form["task"], form["template"]  # as runs of older versions
    (tmp_path / "model" / "prompt.json").write_text(json.dumps(form))
    (tmp_path / "a.csv").write_text("prompt\nAda (36):\n")
    files = [f"model={tmp_path}", f"output={tmp_path / 'out.jsonl'}", "device=cpu"]
    assert main([*files, f"input={tmp_path / 'a.csv'}"]) == 0
    assert texts(rows_of(tmp_path / "out.jsonl")) == list(task.write(model, ["Ada (36):"]).values())
    (tmp_path / "b.csv").write_text("promt\nAda (36):\n")
    assert main([*files, f"input={tmp_path / 'b.csv'}"]) == 2
    assert "has no column prompt: its columns are promt (did you mean promt?)" in capsys.readouterr().err


@pytest.mark.parametrize("starts", [False, True])
def test_documents_are_continued_as_in_training(tmp_path, starts):
    tokenizer = tokenizer_of()
    if starts:  # a tokenizer that begins every text, as Llama's
        from tokenizers.processors import TemplateProcessing

        tokenizer.add_special_tokens({"bos_token": "<s>"})
        special = [("<s>", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=special)
    documents = [Document("Ada came on Monday with a cough. " * 3, "x")]
    task = Documents(documents, documents, tokenizer, data=DocumentsData(max_length=40), beams=1, **KNOWN)
    task.release(model_of(tokenizer), tmp_path / "model")
    (tmp_path / "a.txt").write_text("Ada came\n")
    answerer = load_answerer(tmp_path, device=torch.device("cpu"))
    (row,) = read_rows(tmp_path / "a.txt", plain=answerer.column)
    tokens = answerer.read(row)
    assert tokens == task.encode_prompt("Ada came")
    assert tokens == task.examples[0][0].ids[: len(tokens)]  # as the document begins in training
    assert tokens[0] == (tokenizer.bos_token_id if starts else tokenizer.eos_token_id)


def test_an_encoder_decoder_reads_the_tokens_of_training(released):
    from memsave.data.text.pairs import input_tokens, pair_format
    from memsave.data.text.tables import Row

    tokenizer = released[1].tokenizer  # adds no end token by itself
    form = {**pair_format(tokenizer, max_length=9, beams=1), "template": None}
    answerer = TextAnswerer(None, tokenizer, form=form, device=torch.device("cpu"))
    assert answerer.read(Row({"prompt": "Ada"}, released[0] / "a.csv", 2)) == input_tokens("Ada", tokenizer)
    with pytest.raises(ValueError, match="the model takes at most 9"):
        answerer.read(Row({"prompt": "a b c d e f g h i j"}, released[0] / "a.csv", 2))


def test_a_released_adapter_answers(generate, tmp_path):
    pytest.importorskip("peft")
    tokenizer = tokenizer_of()
    base = model_of(tokenizer)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    adapted = component("adapter", "lora")().apply(base)
    with torch.no_grad():
        for each in adapted.parameters():
            if each.requires_grad:
                each.normal_(std=0.3)
    task = task_of(OwnRecordsData(prompt=PROMPT, completion="{text}", max_length=40), tokenizer)
    task.release(adapted.eval(), tmp_path / "model")
    assert (tmp_path / "model" / "adapter_config.json").is_file()
    code, rows, errors = generate("a.jsonl", JSONL, model=tmp_path)
    assert code == 0, errors
    assert texts(rows) == list(task.write(adapted, [f"{name} ({age}):" for name, age in PEOPLE]).values())
    assert texts(rows) != texts(generate("a.jsonl", None, output="b.jsonl")[1])
