"""The Trainer of transformers trains privately: each step is the clipped sum of examples alone, and resumes exactly."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import transformers
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from memsave.integrations.transformers import (
    STATE_FILE,
    MemoryCallback,
    PrivacyArguments,
    PrivateTrainer,
    PrivateTrainerMixin,
)
from memsave.models.model_losses import model_losses
from memsave.privacy import PrivacyError
from tests.ghost.test_transformers import PAD, VOCABULARY, WIDE, bert, gpt2, in_float64
from tests.models.test_encoder_decoder import t5
from tests.support.processes import run_processes
from tests.support.sampling import poisson_batches

SIZE, NORM = 11, 0.05
LENGTHS = [3 + number % 4 for number in range(SIZE)]
RDP = {"accountant": "rdp"}  # the exact accountant takes seconds
DRY = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def texts(labels=None):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in LENGTHS]
    found = [{"input_ids": each, "unused": "a column that the model does not take"} for each in ids]
    return [{**each, "labels": each["input_ids"] if labels is None else labels(n)} for n, each in enumerate(found)]


def collate(examples):
    """Pads on the right; labels of the length of the text, too."""
    pad = nn.utils.rnn.pad_sequence
    ids = [each["input_ids"] for each in examples]
    batch = {
        "input_ids": pad(ids, batch_first=True, padding_value=PAD),
        "attention_mask": pad([torch.ones_like(each) for each in ids], batch_first=True),
    }
    labels = [torch.as_tensor(each["labels"]) for each in examples]
    whole = labels[0].dim() == 0
    return {**batch, "labels": torch.stack(labels) if whole else pad(labels, batch_first=True, padding_value=-100)}


def arguments(folder, **options):
    fixed = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "optim": "sgd"}
    fixed |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
    fixed |= {"learning_rate": 0.5, "lr_scheduler_type": "constant", "logging_steps": 1}
    return TrainingArguments(str(folder), **{**fixed, **options})


NOISELESS = PrivacyArguments(noise_multiplier=0.0, target_delta=1e-2, max_grad_norm=NORM, micro_batch_size=3, seed=5)


def make_trainer(model, folder, *, privacy=NOISELESS, kind=PrivateTrainer, data=None, options=None, **kwargs):
    data = texts() if data is None else data
    given = {"train_dataset": data, "data_collator": collate, **kwargs}
    return kind(model=model, args=arguments(folder, **(options or {})), privacy=privacy, **given)


def by_hand(model, data, *, steps, lr=0.5, units=None):
    """The parameters after steps of SGD, in which each example runs alone; `units`: the rows of each example."""
    units = [[row] for row in range(SIZE)] if units is None else units
    size = len(units)
    model = copy.deepcopy(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    draws = poisson_batches(size=size, batch_size=4, seed=NOISELESS.seed)
    for _, examples in zip(range(steps), draws):
        total = [torch.zeros_like(p) for p in parameters]
        for example in examples:
            loss = torch.stack([model(**collate([data[row]])).loss for row in units[example]]).mean()
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            grads = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads)]
            norm = torch.stack([g.norm() for g in grads]).norm()
            for each, grad in zip(total, grads):
                each += grad * (NORM / norm).clamp(max=1)
        with torch.no_grad():
            for parameter, each in zip(parameters, total):
                parameter -= lr * each / 4
    return weights(model)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def adapted():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(gpt2(**DRY), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))


def classifier():
    config = transformers.BertConfig(**WIDE, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.BertForSequenceClassification(config)


MODELS = {
    "causal": (lambda: gpt2(**DRY), texts, {}),
    "causal, checkpoints": (lambda: gpt2(**DRY), texts, {"gradient_checkpointing": True}),
    "causal, lora": (adapted, texts, {}),
    "classification": (classifier, lambda: texts(lambda number: number % 2), {}),
    "seq2seq": (t5, texts, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_steps_are_those_of_examples_alone(tmp_path, name):
    torch.manual_seed(0)
    make, data, options = MODELS[name]
    model, data = in_float64(make()).double(), data()
    expected, before = by_hand(model, data, steps=4), weights(model)
    trainer = make_trainer(model, tmp_path, data=data, options=options)
    trainer.train()
    torch.testing.assert_close(weights(model), expected, rtol=0, atol=1e-7)  # transformers' loss is in float32
    assert (weights(model) - before).abs().max() > 1e-4
    assert trainer.private_gradients.steps == 4 and trainer.private_gradients.clipped > 0
    logs = trainer.state.log_history
    assert len(logs) == 5 and all("epsilon" in each for each in logs)


def test_all_rows_of_a_person_are_one_example(tmp_path):
    torch.manual_seed(0)
    people = "abbacccdebf"
    data = [{**each, "person": name} for each, name in zip(texts(), people, strict=True)]
    units = [[row for row, name in enumerate(people) if name == person] for person in "abcdef"]
    start = in_float64(gpt2(**DRY)).double()
    expected = by_hand(start, data, steps=4, units=units)
    for size in (2, 5):
        model = copy.deepcopy(start)
        privacy = replace(NOISELESS, unit="person", micro_batch_size=size, target_delta=None)
        trainer = make_trainer(model, tmp_path, data=data, privacy=privacy)
        trainer.train()
        torch.testing.assert_close(weights(model), expected, rtol=0, atol=1e-7)
        mechanism = trainer.private_gradients.mechanism
        assert (mechanism.size, mechanism.delta) == (6, 6**-1.1) and trainer.private_gradients.clipped > 0


@pytest.mark.parametrize("column", ["persn", "empty"])
def test_rows_without_a_person_are_refused(tmp_path, column):
    data = [{**each, "person": "a", "empty": ""} for each in texts()]
    trainer = make_trainer(gpt2(**DRY), tmp_path, data=data, privacy=replace(NOISELESS, unit=column))
    with pytest.raises(PrivacyError, match=rf"row 0 of train_dataset has no {column}, which PrivacyArguments\(unit=\)"):
        trainer.train()


def test_the_micro_batch_size_changes_nothing(tmp_path):
    torch.manual_seed(0)
    start = gpt2(**DRY).double()
    found = []
    for size in (1, 30):
        model = copy.deepcopy(start)
        make_trainer(model, tmp_path, privacy=replace(NOISELESS, micro_batch_size=size)).train()
        found.append(weights(model))
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=0, atol=1e-12)


def test_the_noise_is_calibrated_and_epsilon_logged(tmp_path):
    privacy = PrivacyArguments(target_epsilon=3.0, target_delta=1e-2, max_grad_norm=NORM, **RDP)
    data = texts(lambda number: number % 2)
    options = {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch"}
    given = arguments(tmp_path, **options)
    trainer = PrivateTrainer(
        model=bert(), args=given, train_dataset=data, eval_dataset=data[:3], data_collator=collate, privacy=privacy
    )
    assert trainer.epsilon == 0
    trainer.train()
    assert trainer.state.global_step == 6  # two epochs of 11 examples in batches of about 4
    assert 2.9 < trainer.epsilon <= 3.0
    epsilons = [each["epsilon"] for each in trainer.state.log_history]
    assert epsilons == sorted(epsilons) and epsilons[0] > 0 and epsilons[-1] == trainer.epsilon
    assert [each["epoch"] for each in trainer.state.log_history if "eval_loss" in each] == [1, 2]
    assert given.gradient_accumulation_steps == 2 and given.max_grad_norm == 1.0  # the user's object
    with pytest.raises(PrivacyError, match="has spent epsilon"):
        trainer.train()


def test_the_model_is_an_ordinary_one_afterwards(tmp_path):
    model = gpt2()
    trainer = make_trainer(model, tmp_path, options={"max_steps": 2})
    trainer.train()
    before = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**collate(texts()[:2])).loss.backward()
    optimizer.step()
    assert not torch.equal(weights(model), before)
    trainer.save_model(tmp_path / "model")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(weights(again), weights(model))


class Stop(TrainerCallback):
    """Stops after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path, workers):
    privacy = PrivacyArguments(noise_multiplier=1.0, target_delta=1e-2, max_grad_norm=NORM, **RDP)  # secret generators
    torch.manual_seed(0)
    start = gpt2()  # with dropout
    options = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 1, "max_steps": 5}
    options |= {"dataloader_num_workers": workers}
    whole = copy.deepcopy(start)
    make_trainer(whole, tmp_path, privacy=privacy, options=options).train()
    for step in (2, 3):  # within an epoch, and at the start of one
        model = copy.deepcopy(start)
        trainer = make_trainer(model, tmp_path / "again", privacy=privacy, options=options)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert torch.equal(weights(model), weights(whole))
        assert trainer.private_gradients.steps == 5 and trainer.state.epoch == pytest.approx(5 / 3)


def test_an_interrupted_run_continues_in_the_same_trainer(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(gpt2(), tmp_path, options=options, callbacks=[Stop(2)])
    trainer.train()
    assert trainer.private_gradients.steps == 2
    trainer.train(resume_from_checkpoint=True)
    assert trainer.private_gradients.steps == 4 == trainer.state.global_step


def test_a_checkpoint_without_privacy_state_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(gpt2(), tmp_path, options=options).train()
    other = replace(NOISELESS, max_grad_norm=1.0)
    path = str(tmp_path / "checkpoint-2")
    with pytest.raises(PrivacyError, match="made with max_grad_norm"):
        make_trainer(gpt2(), tmp_path, privacy=other, options=options).train(resume_from_checkpoint=path)
    (tmp_path / "checkpoint-2" / STATE_FILE).write_bytes(b"torn")
    with pytest.raises(PrivacyError, match="cannot be read"):
        make_trainer(gpt2(), tmp_path, options=options).train(resume_from_checkpoint=path)
    (tmp_path / "checkpoint-2" / STATE_FILE).unlink()
    with pytest.raises(PrivacyError, match="epsilon that it has spent is not known"):
        make_trainer(gpt2(), tmp_path, options=options).train(resume_from_checkpoint=path)


def token_losses(outputs, labels):
    each = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    each = each.view(len(labels), -1)
    return each.sum(1) / (labels[:, 1:] != -100).sum(1)


class OwnLoss(PrivateTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.loss(model, inputs)


class Plain(Trainer):
    """The class of a user, with a loss of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.loss(model, inputs)


class Mixed(PrivateTrainerMixin, Plain):
    pass


@pytest.mark.parametrize("kind", [OwnLoss, Mixed])
def test_a_loss_of_ones_own(tmp_path, kind):
    torch.manual_seed(0)
    start = gpt2(**DRY).double()
    expected = by_hand(start, texts(), steps=4)
    model = copy.deepcopy(start)
    make_trainer(model, tmp_path, per_example_loss_func=token_losses).train()
    torch.testing.assert_close(weights(model), expected, rtol=0, atol=1e-7)
    model = copy.deepcopy(start)
    kind.loss = staticmethod(lambda model, inputs: model_losses(model, inputs))
    make_trainer(model, tmp_path, kind=kind).train()
    torch.testing.assert_close(weights(model), expected, rtol=0, atol=1e-7)
    kind.loss = staticmethod(lambda model, inputs: model(**inputs).loss)
    with pytest.raises(PrivacyError, match=r"compute_loss returned \(\) for [1-3] examples"):
        make_trainer(copy.deepcopy(start), tmp_path, kind=kind).train()

    def mixing(model, inputs):
        losses = model_losses(model, inputs)
        return losses - losses.mean()

    kind.loss = staticmethod(mixing)
    with pytest.raises(ValueError, match="example"):
        make_trainer(copy.deepcopy(start), tmp_path, kind=kind).train()


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(texts())


SETTINGS = {
    "no length": ({"train_dataset": Endless()}, {}, "needs the number of examples"),
    "loss of the batch": ({"compute_loss_func": lambda *args, **kwargs: 0}, {}, "give per_example_loss_func"),
    "sampling": ({}, {"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy=group_by_length"),
    "drop last": ({}, {"dataloader_drop_last": True}, "dataloader_drop_last"),
    "smoothing": ({}, {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    "neftune": ({}, {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
    "batch size": ({}, {"auto_find_batch_size": True}, "auto_find_batch_size"),
    "compile": ({}, {"torch_compile": True}, "torch_compile"),
    "liger": ({}, {"use_liger_kernel": True}, "use_liger_kernel"),
    "fused optimizer": ({}, {"optim": "adalomo"}, "optim=adalomo"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_break_the_guarantee_are_refused(tmp_path, name):
    kwargs, options, sentence = SETTINGS[name]
    kwargs = dict(kwargs)
    data = kwargs.pop("train_dataset", None)
    with pytest.raises(PrivacyError, match=sentence):
        make_trainer(gpt2(), tmp_path, data=data, options=options, **kwargs)


def test_choosing_by_scores_on_the_training_data_is_refused(tmp_path):
    data = texts()
    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "loss",
        "load_best_model_at_end": True,
    }
    options |= {"save_strategy": "steps", "save_steps": 1, "greater_is_better": True}
    kwargs = {"data": data, "options": options, "callbacks": [EarlyStoppingCallback(1)]}
    with pytest.raises(PrivacyError, match="scores on train_dataset"):
        make_trainer(gpt2(), tmp_path, eval_dataset=data, **kwargs)
    trainer = make_trainer(gpt2(), tmp_path, eval_dataset=texts()[:4], **kwargs)
    trainer.train()
    assert trainer.private_gradients.steps == trainer.state.global_step == 2  # the loss did not grow


class GoOn(TrainerCallback):
    """Ignores the end of the training."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = False


def test_no_step_is_taken_beyond_those_of_the_target(tmp_path):
    privacy = PrivacyArguments(target_epsilon=3.0, target_delta=1e-2, **RDP)
    trainer = make_trainer(gpt2(), tmp_path, privacy=privacy, options={"max_steps": 2}, callbacks=[GoOn()])
    with pytest.raises(PrivacyError, match="for 2 steps"):
        trainer.train()
    assert trainer.private_gradients.steps == 2 and trainer.epsilon <= 3.0


def test_other_misuses_are_refused(tmp_path):
    with pytest.raises(PrivacyError, match="either target_epsilon or noise_multiplier"):
        PrivacyArguments()
    trainer = make_trainer(gpt2(), tmp_path)
    with pytest.raises(PrivacyError, match="call train"):
        trainer.get_train_dataloader()
    with pytest.raises(PrivacyError, match="trains many models"):
        trainer.hyperparameter_search()
    merged = make_trainer(gpt2(), tmp_path)
    merged.data_collator = lambda examples: collate([{**examples[0]}])
    with pytest.raises(PrivacyError, match="keep the examples apart"):
        merged.train()


@pytest.mark.parametrize("private", [False, True])
def test_a_step_is_recorded(tmp_path, private):
    page = tmp_path / "memory.html"
    options = {"optim": "adamw_torch", "max_steps": 3}
    if private:
        trainer = make_trainer(gpt2(), tmp_path, options=options, callbacks=[MemoryCallback(str(page))])
    else:
        args = arguments(tmp_path, **options)
        callbacks = [MemoryCallback(str(page))]
        trainer = Trainer(gpt2(), args, train_dataset=texts(), data_collator=collate, callbacks=callbacks)
    trainer.train()
    text = page.read_text()
    assert "transformer.h.1" in text and "optimizer" in text and "activation" in text


def train_in_a_group(folder):
    from memsave.processes import process_rank

    torch.manual_seed(process_rank())  # the processes begin with different weights
    model = gpt2(**DRY).double()
    options = {"ddp_backend": "gloo", "per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 2}
    options |= {"eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(model, folder, options=options, eval_dataset=texts()[:5])
    assert trainer.expected_batch_size == 4
    trainer.train()
    whole = weights(model)
    again = make_trainer(gpt2(**DRY).double(), folder, options=options, eval_dataset=texts()[:5])
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    return whole, weights(again.model), trainer.private_gradients.examples, losses


def test_two_processes_train_as_one(tmp_path):
    torch.manual_seed(0)
    model = gpt2(**DRY).double()
    alone = make_trainer(model, tmp_path / "alone")
    alone.train()
    losses = [each["loss"] for each in alone.state.log_history if "loss" in each]
    for whole, resumed, examples, found in run_processes(2, train_in_a_group, tmp_path, group=False):
        torch.testing.assert_close(whole, weights(model), rtol=0, atol=1e-12)
        assert torch.equal(resumed, whole)
        assert examples == alone.private_gradients.examples and found == pytest.approx(losses, rel=1e-6)
