"""Classification by each objective: losses, scores, files, releases, and runs of the command."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("transformers")

import transformers

import memsave
from memsave.config.compose import compose, to_objects
from memsave.data.loader import Index
from memsave.data.text.feedback import LABELS, private_comments, public_reviews
from memsave.data.text.labelled import Labelled
from memsave.data.text.templates import Template, Text, encode_texts, template_of
from memsave.ghost import GhostClipper, verify
from memsave.run import execute
from memsave.tasks.definition import definition_of
from memsave.tasks.language import classifier
from memsave.tasks.language.classifier import Classification, Objective, classify, spread
from memsave.tasks.language.small_gpt2 import SmallGPT2, small_gpt2, train_tokenizer
from memsave.tasks.language.small_roberta import SmallRoberta, small_roberta, train_masked_tokenizer
from tests.support.per_example_reference import assert_exact
from tests.support.tiny_configs import TINY_ROBERTA

SIZES = {"layers": 2, "heads": 2, "width": 16, "positions": 60}
TEMPLATES = {"infilling": "{text} It was {mask}.", "label_words": "{text} It was {label}", "head": None}
KINDS = ["infilling", "label_words", "head", "causal head"]


@pytest.fixture(scope="module")
def tokenizers():
    texts = [*public_reviews(300), *(each.text for each in private_comments(100))]
    return {"masked": train_masked_tokenizer(texts, size=800), "causal": train_tokenizer(texts, size=800)}


def make(kind, tokenizers, **options):
    """(the task, its model in float64)."""
    torch.manual_seed(0)
    is_causal = kind in ("label_words", "causal head")
    tokenizer = tokenizers["causal" if is_causal else "masked"]
    if is_causal:
        model = small_gpt2(SmallGPT2(**SIZES), tokenizer)
        head = transformers.GPT2ForSequenceClassification
    else:
        model = small_roberta(SmallRoberta(**SIZES), vocabulary=len(tokenizer))
        head = transformers.RobertaForSequenceClassification
    own = kind.removeprefix("causal ")
    if own == "head":
        model.config.pad_token_id = tokenizer.pad_token_id
        model = head(model.config)
    form = Template("{text}" if kind == "causal head" else TEMPLATES[own], 40, own == "infilling")
    words = None if own == "head" else ("terrible", "great")
    objective = Objective(own, form, LABELS, words, positive=1)
    rows = {"train": private_comments(24), "held_out": private_comments(30, seed=1), **options}
    task = Classification(rows["train"], rows["held_out"], tokenizer, objective=objective, device=torch.device("cpu"))
    return task, model.double()


def batch_of(task, count=5):
    return task.load([Index(number, number) for number in range(count)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_is_that_of_the_text_alone_without_padding(kind, tokenizers):
    task, model = make(kind, tokenizers)
    batch = batch_of(task)
    assert (batch["attention_mask"] == 0).any()
    losses = task.per_example_losses(model.eval(), batch)
    for number in range(5):
        alone = task.load([Index(number, 0)])
        assert (alone["attention_mask"] == 1).all()
        torch.testing.assert_close(task.per_example_losses(model, alone)[0], losses[number], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_clipping_is_exact(kind, tokenizers):
    task, model = make(kind, tokenizers)
    batch = batch_of(task)
    for passes in (1, 2):
        report = verify(model.eval(), batch, task.per_example_losses, passes=passes)
        assert report.ok, report
    assert_exact(model, batch, task.per_example_losses)


def test_infilling_is_a_softmax_over_the_label_words(tokenizers):
    task, model = make("infilling", tokenizers)
    batch, tokenizer = batch_of(task), task.tokenizer
    logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    at = (batch["input_ids"] == tokenizer.mask_token_id).long().argmax(1)
    words = [tokenizer.convert_tokens_to_ids(f"Ġ{word}") for word in ("terrible", "great")]
    expected = torch.nn.functional.cross_entropy(logits[range(5), at][:, words], batch["label"], reduction="none")
    torch.testing.assert_close(task.per_example_losses(model, batch), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_files_and_release(kind, tokenizers, tmp_path):
    task, model = make(kind, tokenizers)
    first, scores = task.evaluate(model), task.evaluate(model)
    assert first == scores
    names = {f"{name}{end}" for name in ("accuracy", "f1", "mcc") for end in ("", "_low", "_high")}
    assert set(scores) == {*names, "cross_entropy"}
    assert task.goal in scores
    assert "accuracy" in task.summary(scores) and "before" in task.summary(scores)
    picture, samples = task.show(tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = samples.read_text()
    assert "## Wrong" in text and "predicted: **" in text
    task.release(model, tmp_path / "model")
    prompt = json.loads((tmp_path / "model" / "prompt.json").read_text())
    assert prompt["task"] == "classification"
    assert prompt["labels"] == list(LABELS)
    loaded = memsave.load(tmp_path / "model")
    assert type(loaded) is type(model)
    assert loaded.config.id2label == dict(enumerate(LABELS))
    # the files alone give the same labels
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    encoded, _ = encode_texts([Text(each.text) for each in task.held_out], tokenizer, template_of(prompt))
    assert encoded == task.held_out_texts
    words = prompt["label_word_tokens"] and torch.tensor(prompt["label_word_tokens"])
    options = {"kind": prompt["objective"], "words": words, "pad": tokenizer.pad_token_id}
    found = classify(loaded.double(), encoded, **options, device=torch.device("cpu"))
    assert found == pytest.approx(task.evaluations[-1].probabilities, abs=1e-4)


def test_probabilities_are_in_the_order_of_the_texts(tokenizers, monkeypatch):
    """Batches have texts of similar length."""
    task, model = make("infilling", tokenizers)
    options = {"kind": "infilling", "words": task.words, "pad": task.tokenizer.pad_token_id}
    alone = [classify(model, [each], **options, device=torch.device("cpu"))[0] for each in task.held_out_texts]
    monkeypatch.setattr(classifier, "BATCH", 4)
    assert classify(model, task.held_out_texts, **options, device=torch.device("cpu")) == pytest.approx(np.stack(alone))


def test_counts_name_labels_and_cuts(tokenizers):
    rows = [*(Labelled("Good food.", None, 1) for _ in range(3)), Labelled("The food was cold. " * 20, None, 0)]
    task, _ = make("infilling", tokenizers, train=rows)
    assert task.counts["cut_examples"] == 1
    assert sum(task.counts["labels"].values()) == task.size == 4
    assert task.counts["held_out"]["texts"] == 30
    assert "1 cut to 40 tokens (data.max_length)" in task.describe_counts()


def test_scored_texts_are_spread():
    assert spread(list(range(10)), 4) == [0, 2, 5, 7]
    assert spread([1, 2], 5) == [1, 2]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def command(tmp_path, cache, monkeypatch):
    """Run a tiny roberta_dp in this process; returns (exit code, result, folder)."""
    monkeypatch.setenv("MEMSAVE_CACHE", str(cache))

    def call(*overrides, name="run", start=("experiment=roberta_dp", *TINY_ROBERTA)):
        folder = tmp_path / name
        folder.mkdir()
        code = execute(compose([*start, *overrides]), folder, experiment="roberta_dp")
        return code, json.loads((folder / "result.json").read_text()), folder

    return call


ROUGH = ["privacy.noise_multiplier=1.0", "privacy.accountant=rdp"]  # the exact accountant takes seconds
GPT2 = ["model.layers=2", "model.heads=2", "model.width=16", "model.vocabulary=700", "model.positions=60"]
GPT2 += ["model.records=40", "model.steps=2", "model.batch_size=4"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["memory=checkpoint", *ROUGH],
        ["task.objective=head", "task.label_words=null", "privacy=none"],
        pytest.param(
            ["privacy=direct", "trainer.micro_batch_size=1", "trainer.batch_size=4", *ROUGH], marks=pytest.mark.slow
        ),
        pytest.param(["memory=auto", "budget=1GiB", "privacy=none"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_objectives_run(command, overrides):
    code, result, folder = command(*overrides)
    assert code == 0, result
    assert {"accuracy", "accuracy_before", "f1_low", "mcc_high"} <= result["metrics"].keys()
    assert (folder / "confusion.png").is_file()
    assert (result["privacy"] is None) == ("privacy=none" in overrides)


@pytest.mark.parametrize("passes", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("objective", ["infilling", "head", "label_words", "causal head"])
def test_a_private_step_can_be_planned_on_fake_tensors(objective, passes):
    start = ["experiment=roberta_dp", "data.max_length=20", "task.label_words=null"]
    start += [f"task.objective={objective.removeprefix('causal ')}"]
    start += [*GPT2, "model=small_gpt2"] if objective in ("label_words", "causal head") else TINY_ROBERTA[:5]
    definition = definition_of(to_objects(compose(start)))
    with FakeTensorMode():
        model = definition.make_fake_model()
        clipper = GhostClipper(model, max_grad_norm=0.1, passes=passes)
        batch = definition.dummy_batch(count=3, device=torch.device("cpu"))
        norms = clipper.backward(definition.per_example_losses(model, batch))
    assert norms.shape == (3,)
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("model", ["small_gpt2", "rev_gpt2"])
@pytest.mark.slow
def test_label_words_of_a_causal_model_run(command, model):
    start = ["experiment=roberta_dp", f"model={model}", "task.objective=label_words", "data.comments=40"]
    start += ["data.held_out=10", "trainer.steps=2", "trainer.batch_size=8", "data.max_length=50"]
    words = ["task.label_words=[b,g]", *GPT2]
    memory = "memory=reversible" if model == "rev_gpt2" else "memory=stored"
    code, result, folder = command(*words, memory, *ROUGH, start=start)
    assert code == 0, result
    assert type(memsave.load(folder)).__name__ in ("GPT2LMHeadModel", "RevGPT2")


def test_a_stopped_private_run_continues_as_if_it_had_not_stopped(command, tmp_path):
    seeded = [*ROUGH, "privacy.seed=1", "trainer.evaluate_first=false", "trainer.checkpoint_every=1"]
    code, whole, folder = command(*seeded, name="whole")
    assert code == 0, whole
    half = tmp_path / "half"
    half.mkdir()
    shutil.copytree(folder / "checkpoint.previous", half / "checkpoint")  # that of the first step
    shutil.copy(folder / "config.yaml", half)
    code, resumed, _ = command(*seeded, f"trainer.resume={half}", name="resumed")
    assert code == 0, resumed
    assert resumed["metrics"] == whole["metrics"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task.label_words=[good]"], "task.label_words is ['good'], but there are 2 labels: negative, positive"),
        (["task.positive=neutral"], "task.positive is 'neutral'; give one of the labels negative, positive"),
        (["task.label_words=[terrible,unbelievable]"], "which is"),
        (["data.max_length=61"], "data.max_length is 61, but the model has 60 positions"),
        (["task.objective=label_words", "task.template='{text} It was'"], "task.objective=head or infilling"),
    ],
)
def test_wrong_configs_give_one_sentence(command, overrides, words):
    code, result, _ = command(*overrides)
    assert code == 2
    assert words in result["error"], result["error"]


def test_a_model_without_its_head_is_refused(command, tokenizers, tmp_path):
    model = transformers.RobertaModel(SmallRoberta(**SIZES).sizes(vocabulary=800))
    model.save_pretrained(tmp_path / "encoder")
    tokenizers["masked"].save_pretrained(tmp_path / "encoder")
    start = ["experiment=roberta_dp", "model=roberta", f"model.name={tmp_path / 'encoder'}", "data.max_length=50"]
    code, result, _ = command(start=start)
    assert code == 2
    assert "holds no pretrained head for masked tokens" in result["error"]
