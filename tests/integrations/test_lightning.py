"""A LightningModule trains privately: steps of examples alone, and resumption to the bit."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("lightning")

from lightning.pytorch import Callback, LightningModule, Trainer

from memsave.integrations.lightning import MemoryCallback, PrivacyArguments, PrivateDDPStrategy, PrivateModule
from memsave.privacy import PrivacyError
from tests.support.processes import run_processes
from tests.support.sampling import poisson_batches

SIZE, NORM, BATCH = 11, 0.5, 4
NOISELESS = PrivacyArguments(noise_multiplier=0.0, target_delta=1e-2, max_grad_norm=NORM, micro_batch_size=3, seed=5)
NOISY = PrivacyArguments(noise_multiplier=1.0, target_delta=1e-2, max_grad_norm=NORM, accountant="rdp")


class Model(PrivateModule):
    def __init__(self, dropout=0.0, optimizer=torch.optim.SGD):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 2)).double()
        self.optimizer = optimizer

    def per_example_losses(self, batch):
        inputs, labels = batch
        return F.cross_entropy(self.network(inputs), labels, reduction="none")

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


def examples():
    inputs = torch.randn(SIZE, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [(each, number % 2) for number, each in enumerate(inputs)]


def fitted(model, folder, *, privacy=NOISELESS, checkpoint=None, data=None, loader=None, **options):
    model.make_private(examples() if data is None else data, batch_size=BATCH, privacy=privacy, **(loader or {}))
    fixed = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "default_root_dir": str(folder)}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(**{**fixed, **quiet, **options})
    trainer.fit(model, ckpt_path=checkpoint)
    return trainer


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_hand(steps):
    model = Model()
    parameters, data = list(model.parameters()), examples()
    draws = poisson_batches(size=SIZE, batch_size=BATCH, seed=NOISELESS.seed)
    for step, rows in zip(range(steps), draws):
        total = [torch.zeros_like(p) for p in parameters]
        for row in rows:
            inputs, label = data[row]
            loss = F.cross_entropy(model.network(inputs[None]), torch.tensor([label]))
            grads = torch.autograd.grad(loss, parameters)
            norm = torch.stack([grad.norm() for grad in grads]).norm()
            for each, grad in zip(total, grads):
                each += grad * (NORM / norm).clamp(max=1)
        with torch.no_grad():
            for parameter, each in zip(parameters, total):
                parameter -= 0.1 * 0.5 ** (step // 2) * each / BATCH
    return weights(model)


def test_steps_are_those_of_examples_alone(tmp_path):
    model = Model()
    trainer = fitted(model, tmp_path)
    torch.testing.assert_close(weights(model), by_hand(6), rtol=0, atol=1e-10)
    assert model.private_gradients.steps == trainer.global_step == 6 and model.private_gradients.clipped > 0
    with pytest.raises(PrivacyError, match="has spent epsilon"):
        fitted(model, tmp_path)
    model.per_example_losses(((torch.zeros(2, 3).double()), torch.zeros(2).long())).sum().backward()  # is ordinary


def test_the_noise_is_calibrated_and_epsilon_logged(tmp_path):
    model = Model()
    privacy = PrivacyArguments(target_epsilon=3.0, target_delta=1e-2, accountant="rdp")
    trainer = fitted(model, tmp_path, privacy=privacy, max_epochs=-1, max_steps=5)
    assert model.private_gradients.steps == 5 and 2.9 < model.epsilon <= 3.0
    assert float(trainer.callback_metrics["epsilon"]) == pytest.approx(model.epsilon)


class Keep(Callback):
    """Saves a checkpoint after each step."""

    def on_train_batch_end(self, trainer, module, *args):
        trainer.save_checkpoint(f"{trainer.default_root_dir}/step-{trainer.global_step}.ckpt")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path, workers):
    options = {"privacy": NOISY, "loader": {"num_workers": workers}}
    whole = Model(dropout=0.0, optimizer=torch.optim.Adam)
    fitted(whole, tmp_path, callbacks=[Keep()], **options)
    for step in (2, 3, 4):
        model = Model(optimizer=torch.optim.Adam)
        fitted(model, tmp_path, checkpoint=str(tmp_path / f"step-{step}.ckpt"), **options)
        assert model.private_gradients.steps == 6
        assert torch.equal(weights(model), weights(whole)), step


def train_in_a_group(folder):
    model = Model()
    strategy = PrivateDDPStrategy(process_group_backend="gloo")
    fitted(model, folder, strategy=strategy, devices=2, use_distributed_sampler=False)
    return weights(model), model.private_gradients.examples


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    ranks = run_processes(2, train_in_a_group, tmp_path, group=False)
    for found, _ in ranks:
        torch.testing.assert_close(found, by_hand(6), rtol=0, atol=1e-10)


def test_misuses_are_refused(tmp_path):
    with pytest.raises(PrivacyError, match="call make_private"):
        Trainer(accelerator="cpu", logger=False, max_epochs=1, enable_checkpointing=False).fit(Model())
    for options, sentence in (
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches"),
        ({"gradient_clip_val": 1.0}, "gradient_clip|clipping"),
        ({"max_epochs": -1}, "has no end"),
    ):
        with pytest.raises(Exception, match=sentence):
            fitted(Model(), tmp_path, **options)
    with pytest.raises(PrivacyError, match=r"PrivacyArguments\(unit=\) is for PrivateTrainer"):
        Model().make_private(examples(), batch_size=BATCH, privacy=replace(NOISELESS, unit="person"))
    with pytest.raises(PrivacyError, match="no length"):
        Model().make_private(iter([]), batch_size=2, privacy=NOISY)
    model = Model()
    model.per_example_losses = lambda batch: F.cross_entropy(model.network(batch[0]), batch[1])
    with pytest.raises(PrivacyError, match=r"per_example_losses returned \(\)"):
        fitted(model, tmp_path)
    plain = copy.deepcopy(examples())
    del plain[SIZE - 1]
    other = Model()
    fitted(Model(), tmp_path, callbacks=[Keep()], max_epochs=1)
    with pytest.raises(PrivacyError, match="made with size"):
        fitted(other, tmp_path, data=plain, checkpoint=str(tmp_path / "step-2.ckpt"))
    with pytest.raises(PrivacyError, match="made with max_grad_norm"):
        changed = replace(NOISELESS, max_grad_norm=1.0)
        fitted(Model(), tmp_path, privacy=changed, checkpoint=str(tmp_path / "step-2.ckpt"))


class Plain(LightningModule):
    def __init__(self):
        super().__init__()
        self.network = Model().network

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def test_a_step_is_recorded(tmp_path):
    pages = [tmp_path / "plain.html", tmp_path / "private.html"]
    fitted(Model(), tmp_path, callbacks=[MemoryCallback(str(pages[1]))])
    options = {"accelerator": "cpu", "logger": False, "max_epochs": 1, "enable_checkpointing": False}
    loader = torch.utils.data.DataLoader(examples(), batch_size=4)
    Trainer(**options, enable_progress_bar=False, callbacks=[MemoryCallback(str(pages[0]))]).fit(Plain(), loader)
    for page in pages:
        text = page.read_text()
        assert "network.3" in text and "activation" in text
    assert "optimizer" in pages[0].read_text()
