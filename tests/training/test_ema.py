"""The average of the weights: definition, checkpoints, evaluation and release."""

import pytest
import torch

from memsave.training import checkpoint
from memsave.training.ema import Ema
from memsave.training.loop import averaged, make_state, run_steps
from tests.support.linear_task import Lines, line_model, trainer

pytestmark = pytest.mark.usefixtures("device")


def test_the_average_follows_its_equation():
    config = trainer(ema=0.5)
    state = make_state(line_model(), config)
    expected = [p.detach().clone() for p in state.model.parameters()]
    for done in run_steps(state, Lines(), config):
        decay = min(0.5, (1 + done.step) / (10 + done.step))
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, state.model.parameters())]
    own = [p.detach().clone() for p in state.model.parameters()]
    with averaged(state):
        for parameter, value in zip(state.model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.data, value, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(a, b) for a, b in zip(own, state.model.parameters(), strict=True))


def test_averaging_does_not_change_training():
    losses = []
    for ema in (0.0, 0.9):
        torch.manual_seed(0)
        config = trainer(ema=ema)
        losses.append([done.loss for done in run_steps(make_state(line_model(), config), Lines(), config)])
    assert losses[0] == losses[1]


def test_the_average_is_restored_from_a_checkpoint(tmp_path):
    config = trainer(ema=0.9)
    state = make_state(line_model(), config)
    for done in run_steps(state, Lines(), config):
        if done.step == 3:
            checkpoint.save(state, tmp_path / "checkpoint")
    resumed = make_state(line_model(), config)
    checkpoint.load(resumed, tmp_path / "checkpoint")
    list(run_steps(resumed, Lines(), config))
    for name, value in state.ema.average.items():
        assert torch.equal(resumed.ema.average[name], value), name


def test_a_checkpoint_without_an_average_starts_it_from_the_weights(tmp_path):
    state = make_state(line_model(), trainer())
    next(run_steps(state, Lines(), trainer()))
    checkpoint.save(state, tmp_path / "checkpoint")
    resumed = make_state(line_model(), trainer(ema=0.9))
    checkpoint.load(resumed, tmp_path / "checkpoint")
    for name, parameter in state.model.named_parameters():
        assert torch.equal(resumed.ema.average[name], parameter)


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_outside_zero_to_one_is_refused(decay):
    with pytest.raises(ValueError, match="between 0 and 1"):
        Ema(line_model(), decay=decay)
