"""Labels by memsave.generate: those of the evaluation, for tables, pairs and plain lines."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from memsave.data.errors import DataError
from memsave.data.text.labelled import Labelled
from memsave.data.text.tables import Row
from memsave.data.text.templates import Template
from memsave.generate import main
from memsave.tasks.language.answering import load_answerer
from memsave.tasks.language.classifier import Classification, Objective
from memsave.tasks.language.small_gpt2 import SmallGPT2, small_gpt2, train_tokenizer
from memsave.tasks.language.small_roberta import SmallRoberta, small_roberta, train_masked_tokenizer

SIZES = {"layers": 2, "heads": 2, "width": 16, "positions": 60}
TEXTS = ["The soup was cold.", "A warm room.", "Nobody came, and I left early.", "It was great!", "so so " * 30]
PAIRS = ["Was it?", None, "Who came?", "How was it?", "Long?"]
TEMPLATES = {
    "infilling": ("{text} It was {mask}.", "{text}? {mask}, {pair}"),
    "label_words": ("{text} It was {label}", "{text} {pair} Answer: {label}"),
    "head": (None, None),
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizers():
    texts = [*TEXTS, "terrible great terrible great"] * 3
    return {"masked": train_masked_tokenizer(texts, size=600), "causal": train_tokenizer(texts, size=600)}


def release(kind, tokenizers, folder, *, has_pairs=False):
    """(the task, its model) of a run in this folder."""
    tokenizer = tokenizers["causal" if kind == "label_words" else "masked"]
    model = small_roberta(SmallRoberta(**SIZES), vocabulary=len(tokenizer))
    if kind == "label_words":
        model = small_gpt2(SmallGPT2(**SIZES), tokenizer)
    elif kind == "head":
        torch.manual_seed(0)
        model = transformers.RobertaForSequenceClassification(model.config)
    with torch.no_grad():
        for each in model.parameters():
            each.mul_(5)  # so that labels differ between texts
    form = Template(TEMPLATES[kind][has_pairs], 40, kind == "infilling")
    words = None if kind == "head" else ("terrible", "great")
    pairs = [each or "Is it?" for each in PAIRS] if has_pairs else [None] * len(TEXTS)
    rows = [Labelled(text, pair, number % 2) for number, (text, pair) in enumerate(zip(TEXTS, pairs))]
    columns = {"text": "note", **({"pair": "question"} if has_pairs else {})}
    objective = Objective(kind, form, ("bad", "good"), words, positive=1)
    task = Classification(rows, rows, tokenizer, objective=objective, columns=columns, device=CPU)
    task.release(model.eval(), folder / "model")
    task.evaluate(model)
    return task, model


@pytest.mark.parametrize("has_pairs", [False, True])
@pytest.mark.parametrize("kind", TEMPLATES)
def test_labels_and_probabilities_are_those_of_the_evaluation(kind, has_pairs, tokenizers, tmp_path):
    task, _ = release(kind, tokenizers, tmp_path, has_pairs=has_pairs)
    expected = task.evaluations[0].probabilities
    rows = [{"id": n, "note": each.text, "question": each.pair, "label": 0} for n, each in enumerate(task.held_out)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    for size in (2, 32):
        files = [f"model={tmp_path}", f"input={tmp_path / 'a.jsonl'}", f"output={tmp_path / f'{size}.jsonl'}"]
        assert main([*files, f"batch_size={size}", "device=cpu"]) == 0
        found = [json.loads(line) for line in (tmp_path / f"{size}.jsonl").read_text().splitlines()]
        assert [each["predicted"] for each in found] == [("bad", "good")[n] for n in expected.argmax(1)]
        assert [each["probability"] for each in found] == pytest.approx(expected.max(1).tolist(), abs=1e-4)
        assert list(found[0]) == ["line", *rows[0], "predicted", "probability"]


def test_plain_lines_are_texts(tokenizers, tmp_path):
    task, _ = release("infilling", tokenizers, tmp_path)
    answerer = load_answerer(tmp_path, device=CPU)
    assert answerer.column == "note"
    row = Row({"note": TEXTS[0]}, Path("a.txt"), 1)
    assert answerer.read(row) == task.held_out_texts[0]


@pytest.mark.parametrize(
    ("values", "path", "words"),
    [
        ({"note": " ", "question": "x"}, "a.csv", "a.csv, line 3, has an empty note: fill it in"),
        ({"note": "x", "question": ""}, "a.csv", "a.csv, line 3, has an empty question: fill it in"),
        ({"note": "x"}, "a.csv", "a.csv has no column question"),
        ({"note": "x"}, "a.txt", "a.txt, line 3, is one text: give a table with the columns note and question"),
        ({"note": "a <mask>", "question": "x"}, "a.csv", "a.csv, line 3, cannot be used: .* contains the mask token"),
    ],
)
def test_rows_that_cannot_be_used_are_named(values, path, words, tokenizers, tmp_path):
    release("infilling", tokenizers, tmp_path, has_pairs=True)
    answerer = load_answerer(tmp_path, device=CPU)
    with pytest.raises(DataError, match=words):
        answerer.read(Row(values, Path(path), 3))
