"""The dialog task: exact private gradients, batches, scores, samples and prompt.json."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from memsave.config import ConfigError
from memsave.config.compose import compose, to_objects
from memsave.config.schema import TrainerConfig
from memsave.data.errors import DataError
from memsave.data.loader import Index
from memsave.data.text.calls import CallsData, private_dialogs
from memsave.data.text.collate import collate
from memsave.data.text.encode_dialogs import encode_context
from memsave.data.text.messages import Dialog, Message
from memsave.data.text.tables import Row
from memsave.ghost import verify
from memsave.planning.fake_step import fake_step
from memsave.profiler import MemoryRecorder, peak_on_fake
from memsave.tasks.definition import definition_of
from memsave.tasks.language.answering import load_answerer
from memsave.tasks.language.dialog import DialogConfig, DialogTask
from memsave.tasks.language.small_gpt2 import SmallGPT2, small_gpt2
from tests.support.chat_tokenizers import chat_tokenizer, plain_tokenizer
from tests.support.per_example_reference import assert_exact

SIZES = SmallGPT2(layers=2, heads=2, width=16, vocabulary=400, positions=400)
TOKENIZERS = {"gpt2": plain_tokenizer(), "llama": chat_tokenizer()}


def model_of(name, tokenizer):
    torch.manual_seed(0)
    if name == "gpt2":
        return small_gpt2(SIZES, tokenizer)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=400,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def task_of(name, *, train=None, data=None, **options):
    held_out = private_dialogs(5, seed=1)
    data = data or CallsData(max_length=90, max_rows=None)
    task = DialogConfig(**{"generate": 3, "new_tokens": 6, **options})
    trainer = TrainerConfig(batch_size=4)
    train = train or private_dialogs(8)
    return DialogTask(
        train, held_out, TOKENIZERS[name], data=data, task=task, trainer=trainer, device=torch.device("cpu")
    )


def in_float64(model, monkeypatch):
    """With RMSNorms in float64, too: Llama's computes in float32 inside."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    return model.double()


def short_and_long():
    """Dialogs of one row and of several."""
    long = Dialog(tuple(m for each in private_dialogs(4, seed=2) for m in each.messages[1:]))
    short = Dialog((Message("user", "Hi"), Message("assistant", "Hello.")))
    return [long, short, *private_dialogs(2)]


@pytest.mark.parametrize("head", ["chunked", "logits"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_norms_and_clipped_sums_of_dialogs_are_exact(name, head, monkeypatch):
    task = task_of(name, train=short_and_long())
    task.head = head
    model = in_float64(model_of(name, task.tokenizer), monkeypatch)
    batch = task.load([Index(each, each) for each in range(4)])
    assert batch["input_ids"].dim() == 3
    assert len({int(rows.any(1).sum()) for rows in batch["attention_mask"]}) > 1  # numbers of rows differ
    assert_exact(model, batch, task.per_example_losses)
    for passes in (1, 2):
        assert verify(model, batch, task.per_example_losses, passes=passes).ok
    alone = [task.per_example_losses(model, collate([each], pad=task.tokenizer.pad_token_id)) for each in task.examples]
    torch.testing.assert_close(task.per_example_losses(model, batch), torch.cat(alone), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_loss_of_a_dialog_is_the_mean_over_the_tokens_of_its_replies(name):
    task = task_of(name, train=private_dialogs(1), data=CallsData(max_length=400))
    model = model_of(name, task.tokenizer).double()
    losses = []
    dialog = private_dialogs(1)[0]
    for i, message in enumerate(dialog.messages):
        if message.role == "assistant":
            ids = encode_context(dialog.messages[:i], task.form, limit=1000)
            end = task.form.ends[-1]
            text = f" {message.content}" if name == "gpt2" else message.content
            reply = [*task.tokenizer(text, add_special_tokens=False).input_ids, end]
            logits = model(torch.tensor([[*ids, *reply]])).logits[0].log_softmax(-1)
            losses += [-logits[len(ids) - 1 + t, each].item() for t, each in enumerate(reply)]
    found = task.per_example_losses(model, task.load([Index(0, 0)])).item()
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_the_whole_dialog_is_the_unit_of_privacy():
    task = task_of("gpt2", train=short_and_long())
    assert task.unit == "one dialog with all of its turns"
    assert task.size == 4
    assert task.counts["most_rows"] > 1
    assert "training dialogs: 4, " in task.describe_counts()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_task_is_evaluated_shown_and_released(name, tmp_path):
    task, model = task_of(name), model_of(name, TOKENIZERS[name])
    before, after = task.evaluate(model), task.evaluate(model)
    assert before == after
    assert set(after) == {"perplexity", "word_f1"}
    text = task.show(tmp_path)[0].read_text()
    for context, reply in task.chosen:
        assert f"> **{context[-1].role}:** {context[-1].content}" in text
        assert f"- person: {reply}" in text
    assert text.count("- before: ") == text.count("- after: ") == 3
    assert "word F1 0." in task.summary(after)
    task.release(model, tmp_path / "model")
    written = json.loads((tmp_path / "model" / "prompt.json").read_text())
    assert (written["task"], written["max_prompt_tokens"]) == ("dialog", 84)
    assert written["generate"]["eos_token_id"] == task.form.ends
    if name == "gpt2":
        end = "<|endoftext|>"
        assert [written[key] for key in ("user", "reply_start")] == [f"user: {{content}}{end}", "assistant:"]


def test_a_model_that_knows_the_replies_has_a_word_f1_of_one(monkeypatch):
    task = task_of("gpt2", new_tokens=60, data=CallsData(max_length=300))
    replies = iter([reply for _, reply in task.chosen])
    model = model_of("gpt2", task.tokenizer)

    def generate(input_ids, **options):
        assert options["eos_token_id"] == [task.tokenizer.eos_token_id]
        assert options["max_new_tokens"] == 60
        texts = [f" {next(replies)}<|endoftext|>" for _ in input_ids]
        return torch.cat([input_ids, task.tokenizer(texts, return_tensors="pt", padding=True).input_ids], 1)

    monkeypatch.setattr(model, "generate", generate)
    assert task.evaluate(model)["word_f1"] == 1.0


def test_chosen_replies_are_at_different_positions():
    contexts = [context for context, _ in task_of("gpt2", generate=5).chosen]
    assert len({len(each) for each in contexts}) > 1
    assert all(each[-1].role == "user" for each in contexts)


def config_of(*overrides):
    return to_objects(compose(["experiment=gpt2_dp_dialog", *overrides]))


def test_a_plan_needs_the_number_of_rows():
    device = torch.device("cpu")
    definition = definition_of(config_of("data.max_rows=3", "data.max_length=64"))
    assert definition.dummy_batch(count=2, device=device)["input_ids"].shape == (2, 3, 64)
    assert definition.fixed_sizes() == ["64 tokens", "3 rows"]
    with pytest.raises(
        ConfigError, match=r"data\.max_rows is null, so the size of a batch is unknown; give data\.max_rows"
    ):
        definition_of(config_of("data.max_rows=null")).dummy_batch(count=2, device=device)


@pytest.mark.parametrize("head", ["chunked", pytest.param("logits", marks=pytest.mark.slow)])
@pytest.mark.parametrize("privacy", [pytest.param("none", marks=pytest.mark.slow), "ghost"])
def test_the_peak_of_a_step_with_several_rows_is_predicted(privacy, head):
    sizes = ("model.layers=2", "model.heads=2", "model.width=32", "model.vocabulary=1000", f"model.head={head}")
    shape = ("data.max_rows=3", "data.max_length=64", "trainer.batch_size=4", "trainer.micro_batch_size=2")
    config = config_of(f"privacy={privacy}", *sizes, *shape)
    device = torch.device("cpu")
    predicted = peak_on_fake(lambda: fake_step(config, device=device)).peak_bytes
    made = fake_step(config, device=device)
    made.run()
    with MemoryRecorder(made.model, optimizer=made.optimizer) as recorder:
        made.run()
    masks = 2 * (2 * 3) * 64 * 64 * 4  # transformers creates them on fake tensors alone
    assert predicted - masks == pytest.approx(recorder.report().peak_bytes, rel=0.001)


def test_replies_must_leave_space_for_the_context():
    with pytest.raises(ConfigError, match=r"task\.new_tokens is 160, which leaves no token of data\.max_length=160"):
        config_of("task.new_tokens=160")


def test_a_model_for_tables_keeps_its_place_in_the_cache():
    found = [SmallGPT2().settings(), SmallGPT2(corpus="dialogs").settings()]
    assert "corpus" not in found[0]
    assert found[1] == {**found[0], "corpus": "dialogs"}
    assert found[0]["records"] == 20000


@pytest.mark.parametrize("name", TOKENIZERS)
def test_memsave_generate_writes_the_replies_of_the_evaluation(name, tmp_path):
    task, model = task_of(name, generate=5), model_of(name, TOKENIZERS[name])
    task.evaluate(model)
    task.release(model, tmp_path / "model")
    answerer = load_answerer(tmp_path, device=torch.device("cpu"))
    rows = [row(messages=[each._asdict() for each in context]) for context, _ in task.chosen]
    found = answerer.answer([answerer.read(each) for each in rows])
    assert [each["reply"] for each in found] == task.evaluations[0].texts
    assert answerer.read(row(message="Hi")) == answerer.read(row(messages=[{"role": "user", "content": "Hi"}]))
    persona = [{"role": "system", "content": "I run."}, {"role": "user", "content": "Hi"}]
    assert answerer.read(row(message="Hi", persona="I run.")) == answerer.read(row(messages=persona))
    for values, message in [
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a character"),
        ({"messages": []}, "has no message: add one"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "ends with a message of the assistant: delete that"),
        ({"message": " "}, "has no message: add one"),
        ({"text": "Hi"}, "has no column message: its columns are text"),
    ]:
        with pytest.raises(DataError, match=message):
            answerer.read(row(**values))


def row(**values):
    return Row(values, Path("a.jsonl"), 1)


def test_the_ledger_knows_dialogs_without_their_path():
    dialogs = private_dialogs(3)
    moved = [Dialog(each.messages, f"/other/file, line {i},") for i, each in enumerate(dialogs)]
    found = {task_of("gpt2", train=train).data_fingerprint for train in (dialogs, moved, dialogs[::-1])}
    assert len(found) == 1


def test_an_encoder_decoder_is_refused(tmp_path):
    transformers.T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, vocab_size=40).save_pretrained(tmp_path)
    config = config_of("model=gpt2", f"model.name={tmp_path}")
    with pytest.raises(
        ConfigError, match=r"model=gpt2 .* is an encoder-decoder, which task=dialog does not train; give"
    ):
        definition_of(config).purpose()
