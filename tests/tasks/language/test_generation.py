"""The generation task: tokens, losses, batches, and evaluation, with a tiny model."""

import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sacrebleu")

from memsave.config.schema import TrainerConfig
from memsave.data.loader import Index, shuffled
from memsave.data.text.collate import IGNORED, Tokens, collate, prompts
from memsave.data.text.config import VisitsData
from memsave.data.text.encode import encode_prompt, encode_records
from memsave.data.text.records import Record
from memsave.data.text.visits import private_records, public_records
from memsave.models.language import causal_lm_losses
from memsave.tasks.language.generation import Generation, GenerationConfig
from memsave.tasks.language.small_gpt2 import SmallGPT2, small_gpt2, train_tokenizer
from tests.support.per_example_reference import assert_exact

SIZES = SmallGPT2(layers=2, heads=2, width=16, vocabulary=400, positions=200)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"{each.prompt} {each.completion}" for each in public_records(200)], size=SIZES.vocabulary)


@pytest.fixture
def task(tokenizer):
    return task_of(tokenizer, VisitsData(max_length=120))


def task_of(tokenizer, data, **options):
    train, held_out = private_records(20), private_records(5, seed=1)
    trainer = TrainerConfig(batch_size=8)
    task = GenerationConfig(**{"generate": 3, "beams": 2, **options})
    return Generation(train, held_out, tokenizer, data=data, task=task, trainer=trainer, device=torch.device("cpu"))


def encode(record, tokenizer, *, max_length):
    """(the tokens of the prompt, the tokens of the completion)"""
    ([row],), _ = encode_records([record], tokenizer, max_length=max_length)
    start = row.labels.count(IGNORED)
    assert row.labels == [IGNORED] * start + row.ids[start:]
    assert encode_prompt(record.prompt, tokenizer, max_length=max_length) == row.ids[:start]
    return row.ids[:start], row.ids[start:]


def example(prompt, completion):
    return [Tokens(prompt + completion, [IGNORED] * len(prompt) + completion)]


def model_of(tokenizer):
    return small_gpt2(SIZES, tokenizer)


def test_only_tokens_of_the_text_are_targets(tokenizer):
    record = Record("patient[Ada Lee]", "Ada Lee came.")
    table, text = encode(record, tokenizer, max_length=100)
    assert tokenizer.decode(table) == "patient[Ada Lee]<|endoftext|>"
    assert tokenizer.decode(text) == "Ada Lee came.<|endoftext|>"
    batch = collate([example(table, text), example(table[:3], text[:2])], pad=tokenizer.pad_token_id)
    assert batch["labels"][0].tolist() == [-100] * len(table) + text
    assert batch["labels"][1].tolist() == [-100] * 3 + text[:2] + [-100] * (len(table) + len(text) - 5)
    assert batch["attention_mask"].sum(1).tolist() == [len(table) + len(text), 5]


@pytest.mark.parametrize("max_length", [8, 20, 40])
def test_long_examples_are_cut_and_keep_a_target(tokenizer, max_length):
    record = private_records(1)[0]
    table, text = encode(record, tokenizer, max_length=max_length)
    assert len(table) + len(text) == max_length
    assert table[-1] == tokenizer.eos_token_id
    assert text


def test_a_batch_of_no_examples_has_no_rows(task):
    assert task.load([])["input_ids"].shape[0] == 0


def test_a_loss_is_the_mean_over_the_targets_of_its_example(task, tokenizer):
    model, batch = model_of(tokenizer).double(), task.load([Index(each, each) for each in range(4)])
    losses = task.per_example_losses(model, batch)
    for row in range(4):
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        logits = model(input_ids=ids[None, : int(batch["attention_mask"][row].sum())]).logits[0].log_softmax(-1)
        each = [-logits[t - 1, labels[t]] for t in range(1, len(ids)) if labels[t] != -100]
        assert losses[row].item() == pytest.approx((sum(each) / len(each)).item(), rel=1e-9)


def test_an_example_without_targets_has_loss_zero(tokenizer):
    model, ids = model_of(tokenizer), torch.randint(0, 300, (2, 5))
    labels = ids.clone()
    labels[1] = -100
    assert causal_lm_losses(model, ids, labels)[1] == 0


def test_norms_and_clipped_sums_are_exact(task, tokenizer):
    torch.manual_seed(0)
    batch = task.load([Index(each, each) for each in range(4)])
    assert_exact(model_of(tokenizer).double(), batch, task.per_example_losses)


def test_an_epoch_has_every_record_once_and_batches_can_start_at_any_step(task):
    batches = shuffled(task.size, batch_size=8, seed=0)
    five = [task.load(next(batches)) for _ in range(5)]  # two epochs of 20 records
    rows = [tuple(row[row != task.tokenizer.pad_token_id].tolist()) for batch in five for row in batch["input_ids"]]
    assert len(set(rows[:20])) == len(set(rows[20:])) == 20
    assert rows[:20] != rows[20:]
    again = task.load(next(shuffled(task.size, batch_size=8, seed=0, start=3)))
    assert torch.equal(again["input_ids"], five[3]["input_ids"])


def test_generation_pads_left_and_does_not_depend_on_the_batch(task, tokenizer):
    tables = [record.prompt for record in task.held_out]
    model = model_of(tokenizer)
    batched = task.write(model, tables)
    assert list(batched) == tables
    for table in tables[:2]:
        # a batch limits all texts to the length that the longest table leaves
        assert task.write(model, [table])[table].startswith(batched[table])
    batch = prompts([[5, 6, 7], [8]], pad=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [1, 1, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_the_perplexity_of_a_zero_model_is_the_size_of_the_vocabulary(task, tokenizer):
    model = model_of(tokenizer)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert task.perplexity(model) == pytest.approx(len(tokenizer), rel=1e-4)


def test_a_task_is_evaluated_shown_and_released(task, tokenizer, tmp_path):
    model = model_of(tokenizer)
    before = task.evaluate(model)
    after = task.evaluate(model)
    assert before == after
    assert set(after) == {"perplexity", "bleu", "rouge_l"}
    assert all(math.isfinite(each) for each in after.values())
    text = task.show(tmp_path)[0].read_text()
    for record in task.held_out[:3]:
        assert record.prompt in text
        assert record.completion in text
    assert "before: " in text
    task.release(model, tmp_path / "model")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token_id == tokenizer.eos_token_id


def test_cut_examples_are_counted_and_described(tokenizer):
    records, length = private_records(20), 60
    whole = [sum(map(len, encode(each, tokenizer, max_length=10**6))) for each in records]
    _, cuts = encode_records(records, tokenizer, max_length=length)
    assert cuts.examples == 20
    assert 0 < cuts.cut_examples == sum(each > length for each in whole)
    assert cuts.cut_tokens == sum(max(0, each - length) for each in whole)
    assert encode_records(records, tokenizer, max_length=8)[1].lost_texts == 20
    task = task_of(tokenizer, VisitsData(max_length=length), evaluate=4)
    assert task.counts["cut_tokens"] == cuts.cut_tokens
    assert task.counts["held_out"] | {"records": 5, "examples": 4, "written_prompts": 3} == task.counts["held_out"]
    description = task.describe_counts()
    dropped = f"which drops {cuts.cut_tokens} tokens"
    assert f"{cuts.cut_examples} cut to 60 tokens (data.max_length), {dropped}" in description
    assert "held-out records: 5, of which 4 are scored (task.evaluate)" in description
    assert "of which 3 get generated texts (task.generate)" in description
    tight = task_of(tokenizer, VisitsData(max_length=8))
    assert "20 of them keep a single token of their text" in tight.describe_counts()
    assert "none cut to 2000 tokens" in task_of(tokenizer, VisitsData(max_length=2000)).describe_counts()


def test_the_data_are_the_same_for_any_length_and_others_with_another_record(tokenizer):
    def task(train, max_length):
        data = VisitsData(max_length=max_length)
        known = {"data": data, "trainer": TrainerConfig(), "device": torch.device("cpu")}
        return Generation(train, private_records(2, seed=1), tokenizer, **known)

    records = private_records(20)
    first, cut = task(records, 120), task(records[::-1], 20)
    assert first.data_fingerprint == cut.data_fingerprint and first.fingerprint != cut.fingerprint
    assert task(records[1:], 120).data_fingerprint != first.data_fingerprint


def test_tokens_are_counted_without_padding(task):
    batch = task.load([Index(0, 0), Index(1, 1), Index(2, 2)])
    assert task.count_tokens(batch) == sum(len(row.ids) for example in task.examples[:3] for row in example)
    assert task.count_tokens(batch) < batch["input_ids"].numel()
    assert task.count_tokens(task.load([])) == 0
