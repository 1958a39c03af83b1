"""TRL's SFTTrainer and DPOTrainer train privately: each step is the clipped sum of examples alone."""

import copy

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("transformers")

import transformers
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from memsave.integrations.transformers import PrivacyArguments, PrivateTrainerMixin
from memsave.privacy import PrivacyError
from tests.support.released_texts import tokenizer_of
from tests.support.sampling import poisson_batches

pytestmark = pytest.mark.slow

SIZE, BATCH, NORM, SEED, STEPS, RATE = 11, 4, 0.5, 5, 3, 0.1


class PrivateSFT(PrivateTrainerMixin, SFTTrainer):
    pass


class PrivateDPO(PrivateTrainerMixin, DPOTrainer):
    pass


@pytest.fixture(scope="module")
def tokenizer():
    found = tokenizer_of()
    found.chat_template = None
    return found


def made(tokenizer):
    torch.manual_seed(0)
    sizes = {"n_positions": 128, "n_embd": 16, "n_layer": 2, "n_head": 2}
    dry = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(tokenizer), **sizes, **dry, **ends))


def options(folder):
    fixed = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "optim": "sgd"}
    fixed |= {"per_device_train_batch_size": BATCH, "max_steps": STEPS, "learning_rate": RATE, "bf16": False}
    return {"output_dir": str(folder), **fixed, "lr_scheduler_type": "constant", "max_length": 64}


def privacy(**more):
    return PrivacyArguments(noise_multiplier=0.0, target_delta=1e-2, max_grad_norm=NORM, seed=SEED, **more)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_hand(model, loss_of):
    """The parameters after the steps, in which `loss_of(model, row)` is the loss of each example alone."""
    parameters = list(model.parameters())
    draws = poisson_batches(size=SIZE, batch_size=BATCH, seed=SEED)
    for _, rows in zip(range(STEPS), draws):
        total = [torch.zeros_like(p) for p in parameters]
        for row in rows:
            grads = torch.autograd.grad(loss_of(model, row), parameters)
            norm = torch.stack([grad.norm() for grad in grads]).norm()
            for each, grad in zip(total, grads):
                each += grad * (NORM / norm).clamp(max=1)
        with torch.no_grad():
            for parameter, each in zip(parameters, total):
                parameter -= RATE * each / BATCH
    return weights(model)


def test_sft(tokenizer, tmp_path):
    rows = [{"prompt": f"Visit {number}:", "completion": " came." * (1 + number % 3)} for number in range(SIZE)]
    model = made(tokenizer)
    start = copy.deepcopy(model)
    trainer = PrivateSFT(
        model=model,
        processing_class=tokenizer,
        args=SFTConfig(**options(tmp_path)),
        train_dataset=Dataset.from_list(rows),
        privacy=privacy(micro_batch_size=3),
    )
    data, collate = list(trainer.train_dataset), trainer.data_collator
    trainer.train()

    def alone(model, row):
        batch = collate([data[row]])
        names = ("input_ids", "attention_mask", "labels")
        return model(**{name: batch[name] for name in names if name in batch}).loss

    expected = by_hand(start, alone)
    torch.testing.assert_close(weights(model), expected, rtol=0, atol=1e-6)
    assert trainer.private_gradients.clipped > 0 and (batch := collate(data[:3]))["labels"].eq(-100).any()
    assert len(batch["labels"]) == 3


def test_dpo_one_pair_at_a_time(tokenizer, tmp_path):
    rows = [
        {"prompt": f"Visit {number}:", "chosen": " came." * (1 + number % 3), "rejected": " left. He"}
        for number in range(SIZE)
    ]
    model, reference = made(tokenizer), made(tokenizer)
    start, given = copy.deepcopy(model), {"processing_class": tokenizer, "train_dataset": Dataset.from_list(rows)}
    args = DPOConfig(**options(tmp_path))
    plain = DPOTrainer(model=start, ref_model=made(tokenizer), args=copy.copy(args), **given)
    trainer = PrivateDPO(
        model=model, ref_model=reference, args=args, privacy=privacy(micro_batch_size=1, passes="direct"), **given
    )
    data, collate = list(trainer.train_dataset), trainer.data_collator
    trainer.train()
    expected = by_hand(start, lambda model, row: plain.compute_loss(model.train(), collate([data[row]])))
    torch.testing.assert_close(weights(model), expected, rtol=0, atol=1e-6)
    several = PrivateDPO(model=made(tokenizer), ref_model=reference, args=args, privacy=privacy(), **given)
    with pytest.raises(PrivacyError, match=r'Any loss works with micro_batch_size=1 and passes="direct"'):
        several.train()


@pytest.mark.parametrize(
    ("setting", "words"),
    [({"packing": True}, "packing puts several examples"), ({"loss_type": "dft"}, "loss_type=dft")],
    ids=["packing", "loss"],
)
def test_settings_that_mix_examples_are_refused(tokenizer, tmp_path, setting, words):
    rows = [{"prompt": f"Visit {number}:", "completion": " came."} for number in range(SIZE)]
    args = SFTConfig(**{**options(tmp_path), **setting})
    with pytest.raises(PrivacyError, match=words):
        PrivateSFT(
            model=made(tokenizer),
            processing_class=tokenizer,
            args=args,
            train_dataset=Dataset.from_list(rows),
            privacy=privacy(),
        )
