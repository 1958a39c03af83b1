"""The training loop: one logical batch is one step, for any micro-batch size."""

import pytest
import torch

from memsave.config.schema import OptimizerConfig
from memsave.data.loader import Index
from memsave.training.loop import TrainingError, accumulate, make_optimizer, make_schedule, make_state, run_steps
from memsave.training.task import examples, split
from tests.support.linear_task import Lines, line_model, trainer

pytestmark = pytest.mark.usefixtures("device")


def test_split_keeps_every_example_in_order():
    batch = {"x": torch.arange(7), "id": list("abcdefg")}
    parts = list(split(batch, 3))
    assert [examples(part) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part["x"] for part in parts]), batch["x"])
    assert [name for part in parts for name in part["id"]] == batch["id"]


@pytest.mark.parametrize("size", [None, 1, 2, 4, 6, 100])
def test_the_micro_batch_size_changes_no_gradient(size):
    model, task = line_model().eval(), Lines()
    batch = task.place(task.data[0])
    loss = accumulate(model, task, batch, trainer(micro_batch_size=size))
    expected = task.per_example_losses(model, batch).mean()
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-11, atol=1e-14)


def test_steps_are_numbered_and_reduce_the_loss():
    task = Lines(batches=1)
    task.data *= 30
    done = list(run_steps(make_state(line_model(), trainer(steps=30)), task, trainer(steps=30)))
    assert [each.step for each in done] == list(range(1, 31))
    assert done[-1].loss < 0.7 * done[0].loss


def test_gradients_are_freed_after_a_step():
    state, task = make_state(line_model(), trainer()), Lines()
    next(run_steps(state, task, trainer()))
    assert all(parameter.grad is None for parameter in state.model.parameters())


def test_the_learning_rate_warms_up_and_follows_a_cosine_to_zero():
    config = OptimizerConfig(lr=1.0, warmup_steps=4)
    optimizer = make_optimizer(line_model(), config)
    schedule = make_schedule(optimizer, config, steps=12)
    rates = []
    for _ in range(13):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[8] == pytest.approx(0.5)
    assert rates[12] == pytest.approx(0.0)


def rates(config, *, steps):
    optimizer = make_optimizer(line_model(), config)
    schedule = make_schedule(optimizer, config, steps=steps)
    found = []
    for _ in range(steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_the_learning_rate_decays_linearly_to_zero_after_the_last_step():
    config = OptimizerConfig(lr=1.0, warmup_steps=2, schedule="linear")
    expected = [1 / 3, 2 / 3, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0.0]
    assert rates(config, steps=10) == pytest.approx(expected)


def test_a_linear_schedule_without_warm_up_is_that_of_transformers():
    optimization = pytest.importorskip("transformers.optimization")
    config = OptimizerConfig(lr=1.0, warmup_steps=0, schedule="linear")
    optimizer = make_optimizer(line_model(), config)
    other = optimization.get_linear_schedule_with_warmup(optimizer, 0, 7)
    assert rates(config, steps=7) == pytest.approx([other.lr_lambdas[0](step) for step in range(8)])


class Words(Lines):
    """Examples with two, three, ... tokens; the padding is `mask == 0`."""

    def load(self, indices):
        tokens = torch.tensor([2 + each.example % 5 for each in indices], device="cpu")
        return {**super().load(indices), "mask": (torch.arange(8, device="cpu") < tokens[:, None]).long()}

    def count_tokens(self, batch):
        assert batch["mask"].device.type == "cpu"
        return int(batch["mask"].sum())


def test_steps_of_a_task_with_tokens_count_them_and_those_of_others_do_not():
    config = trainer(steps=3)
    counted = [each.tokens for each in run_steps(make_state(line_model(), config), Words(), config)]
    assert all(6 * 2 <= tokens <= 6 * 6 for tokens in counted) and len(set(counted)) > 1
    plain = run_steps(make_state(line_model(), config), Lines(), config)
    assert [each.tokens for each in plain] == [None] * 3


def test_norms_and_biases_have_no_weight_decay():
    groups = make_optimizer(line_model(), OptimizerConfig(weight_decay=0.1)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.dim() > 1 for p in groups[0]["params"])
    assert all(p.dim() == 1 for p in groups[1]["params"])


def test_a_loss_that_is_not_finite_raises_before_the_update():
    state, task = make_state(line_model(), trainer()), Lines()
    task.data[1]["y"][2] = float("nan")
    steps = run_steps(state, task, trainer())
    next(steps)
    before = [p.clone() for p in state.model.parameters()]
    with pytest.raises(TrainingError, match=r"loss of step 2 is nan; lower trainer\.optimizer\.lr"):
        next(steps)
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))


def test_a_task_that_returns_a_mean_is_refused():
    class Mean(Lines):
        def per_example_losses(self, model, batch):
            return super().per_example_losses(model, batch).mean()

    with pytest.raises(TrainingError, match=r"shape \(\) for 6 examples; return one loss per example"):
        next(run_steps(make_state(line_model(), trainer()), Mean(), trainer()))


def test_float16_losses_are_scaled_and_an_overflow_skips_the_step():
    task, config = Lines(dtype=torch.float32), trainer(precision="float16")
    state = make_state(line_model(torch.float32), config)
    assert state.scaler is not None
    state.model[2].p = 0.0  # on a GPU, the numbers that dropout draws depend on the dtype
    scale = state.scaler.get_scale()
    plain = make_state(line_model(torch.float32), trainer())
    plain.model[2].p = 0.0
    torch.manual_seed(1)
    done = list(run_steps(state, task, config))
    torch.manual_seed(1)
    expected = list(run_steps(plain, task, trainer()))
    for one, other in zip(done[:3], expected[:3], strict=True):
        assert one.loss == pytest.approx(other.loss, rel=0.02)  # not the scaled loss

    before = [p.detach().clone() for p in state.model.parameters()]
    state.step = 0
    task.per_example_losses = lambda model, batch: 1e34 * Lines.per_example_losses(task, model, batch)
    next(run_steps(state, task, config))
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))
    assert state.scaler.get_scale() < scale


def test_too_few_batches_raise_an_error(monkeypatch):
    monkeypatch.setattr("memsave.training.loop.shuffled", lambda *_, **__: [[Index(0, 0)], [Index(1, 1)]])
    state = make_state(line_model(), trainer(steps=5))
    with pytest.raises(TrainingError, match="the batches ended after step 2, but the run has 5 steps"):
        list(run_steps(state, Lines(), trainer(steps=5)))
