"""The task of whole documents: one loss for all chunks, exact under clipping, and perplexity by token."""

import math
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

pytest.importorskip("transformers")

from memsave.config import ConfigError
from memsave.config.compose import compose, to_objects
from memsave.config.schema import TrainerConfig
from memsave.data.loader import Index
from memsave.data.text.documents import Document, DocumentsData
from memsave.data.text.visits import private_records, public_records
from memsave.planning.fake_step import fake_step
from memsave.tasks.language.documents import Documents
from memsave.tasks.language.small_gpt2 import SmallGPT2, small_gpt2, train_tokenizer
from tests.support.examples_alone import assert_exact_alone
from tests.support.per_example_reference import assert_exact

SIZES = SmallGPT2(layers=2, heads=2, width=16, vocabulary=400, positions=40)
LENGTH = 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([each.completion for each in public_records(200)], size=SIZES.vocabulary)


def document(count):
    return Document(" ".join(each.completion for each in private_records(count, seed=count))[: 60 * count], str(count))


def task_of(tokenizer, *, counts=(1, 3, 2, 1), **options):
    texts = [document(count) for count in counts]
    return Documents(
        texts,
        [document(4), document(5)],
        tokenizer,
        data=DocumentsData(max_length=LENGTH, **options),
        generate=1,
        prompt_tokens=5,
        beams=2,
        trainer=TrainerConfig(),
        device=torch.device("cpu"),
    )


def batch_of(task):
    return task.load([Index(each, each) for each in range(task.size)])


def model_of(tokenizer):
    return small_gpt2(SIZES, tokenizer)


def test_a_loss_is_the_mean_over_all_tokens_of_all_chunks(tokenizer):
    task, model = task_of(tokenizer), model_of(tokenizer).double()
    losses = task.per_example_losses(model, batch_of(task))
    for example, loss in zip(task.examples, losses, strict=True):
        each = []
        for row in example:
            ids = torch.tensor([row.ids])
            each.append(F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none"))
        torch.testing.assert_close(loss, torch.cat(each).mean(), rtol=1e-9, atol=0)
    assert len({len(example) for example in task.examples}) > 1


def test_norms_and_clipped_sums_of_documents_are_exact(tokenizer):
    torch.manual_seed(0)
    task, model = task_of(tokenizer), model_of(tokenizer).double()
    batch = batch_of(task)
    assert batch["input_ids"].dim() == 3
    assert_exact(model, batch, task.per_example_losses)
    assert_exact_alone(model, batch, task.per_example_losses)


def test_the_perplexity_is_that_of_the_tokens(tokenizer):
    task, model = task_of(tokenizer), model_of(tokenizer)
    losses = [
        F.cross_entropy(
            model(input_ids=torch.tensor([row.ids])).logits[0, :-1], torch.tensor(row.ids[1:]), reduction="sum"
        )
        for example in task.held_out_examples
        for row in example
    ]
    count = task.held_out_cuts.tokens
    assert task.perplexity(model) == pytest.approx(math.exp(sum(each.item() for each in losses) / count), rel=1e-5)


def test_cut_chunks_are_counted(tokenizer):
    whole, cut = task_of(tokenizer), task_of(tokenizer, max_chunks=2)
    assert max(map(len, cut.examples)) == 2
    assert cut.examples[0][:2] == whole.examples[0][:2]
    counts = cut.counts
    assert counts["cut_examples"] == sum(len(example) > 2 for example in whole.examples) > 0
    assert counts["cut_tokens"] == whole.counts["tokens"] - counts["tokens"]
    assert "cut to that (data.max_chunks), which drops" in cut.describe_counts()
    assert re.search(
        r"training documents: 4, \d+ chunks of at most 20 tokens .* none cut; held-out", whole.describe_counts()
    )


def test_documents_are_continued_and_released(tokenizer, tmp_path):
    task, model = task_of(tokenizer), model_of(tokenizer)
    assert set(task.evaluate(model)) == {"perplexity"}
    task.evaluate(model)
    text = task.show(tmp_path)[0].read_text()
    (start,) = task.starts
    assert document(4).text.startswith(start)
    assert f"**{start}**" in text
    assert "before: " in text
    prompt = task.prompt_format()["prompt"].format(prompt=start)
    assert tokenizer(prompt, add_special_tokens=False).input_ids == task.encode_prompt(start)
    assert task.summary({"perplexity": 2.0}).startswith("On held-out documents: perplexity 2.00 (before:")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["mode=plan", "budget=1GiB"], "mode=plan"),
        (["vary=batch", "budget=1GiB"], "vary=batch"),
        (["memory=auto", "budget=1GiB"], "memory=auto"),
    ],
)
def test_plans_need_the_largest_number_of_chunks(overrides, key):
    base = ["experiment=text_dp", "data=documents", "data.root=/my/texts", *overrides]
    with pytest.raises(ConfigError, match=f"data.max_chunks is null, .* which {key} needs; give"):
        compose(base)
    assert to_objects(compose([*base, "data.max_chunks=3", "model=small_gpt2"])).data.max_chunks == 3


@pytest.mark.parametrize("head", ["chunked", pytest.param("logits", marks=pytest.mark.slow)])
@pytest.mark.parametrize("privacy", ["none", "ghost"])
def test_a_step_on_documents_is_planned(privacy, head):
    sizes = ["model.layers=1", "model.heads=2", "model.width=16", "model.vocabulary=300", "trainer.batch_size=4"]
    more = ["data.max_chunks=3", "data.max_length=8", f"model.head={head}", f"privacy={privacy}", *sizes]
    config = to_objects(compose(["experiment=text_dp", "data=documents", "data.root=/x", "model=small_gpt2", *more]))
    definition, cpu = config.task.definition(config), torch.device("cpu")
    assert definition.dummy_batch(count=2, device=cpu)["input_ids"].shape == (2, 3, 8)
    assert definition.small_config()[0].data.max_chunks == 2
    assert definition.fixed_sizes() == ["8 tokens", "3 chunks"]
    with FakeTensorMode():
        fake_step(config, device=cpu).run()
