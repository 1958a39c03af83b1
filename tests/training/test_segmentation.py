"""The segmentation task: its loss by hand, and three memory modes that train alike."""

import math

import pytest
import torch

from memsave.compose import compose, to_objects
from memsave.training.experiment import make_model, make_task
from memsave.training.loop import make_state, run_steps
from memsave.training.segmentation import predict, region_losses, supervised_losses

TINY = [
    "experiment=brats_rev",
    "data.cases=4",
    "data.size=[32,32,24]",
    "data.crop_size=[16,16,16]",
    "model.channels=[8,16]",
    "model.blocks=[1,1]",
    "model.expansion=2",
]


def test_loss_by_hand():
    target = torch.zeros(2, 3, 2, 2, 2)
    target[0, 0] = 1
    logits = torch.zeros(2, 3, 2, 2, 2)  # probability 1/2 everywhere
    found = 1 - (2 * 4 + 1) / (4 + 8 + 1) + math.log(2)
    empty = 1 - 1 / (4 + 1) + math.log(2)
    expected = [(found + 2 * empty) / 3, empty]
    assert region_losses(logits, target).tolist() == pytest.approx(expected, rel=1e-6)


def test_an_example_has_no_gradient_from_its_batch_mates():
    torch.manual_seed(0)
    logits = torch.randn(3, 3, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    target = torch.rand(3, 3, 4, 4, 4) > 0.7
    (gradient,) = torch.autograd.grad(region_losses(logits, target)[1], logits)
    assert gradient[1].abs().max() > 0
    assert gradient[[0, 2]].abs().max() == 0


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMSAVE_CACHE", str(tmp_path))
    return lambda *overrides: to_objects(compose([*TINY, *overrides]))


def test_memory_modes_train_alike_for_twenty_steps(tiny):
    curves = {}
    for mode in ("stored", "checkpoint", "reversible"):
        config = tiny(f"memory={mode}", "trainer.steps=20", "model.dropout=0.1")
        torch.manual_seed(0)
        task = make_task(config, torch.device("cpu"))
        state = make_state(make_model(config)[0], config.trainer)
        curves[mode] = [done.loss for done in run_steps(state, task, config.trainer)]
    assert curves["stored"][-1] < curves["stored"][0]
    assert curves["checkpoint"] == pytest.approx(curves["stored"], rel=1e-4)
    assert curves["reversible"] == pytest.approx(curves["stored"], rel=1e-4)


def test_prediction_covers_the_whole_volume(tiny):
    model, _ = make_model(tiny())
    image = torch.randn(4, 20, 33, 18)
    assert predict(model, image, window=(16, 16, 16)).shape == (3, 20, 33, 18)
    assert model.training


def test_coarser_levels_count_half_as_much_each():
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(2, 3, size, size, size, generator=generator) for size in (8, 4, 2)]
    target = torch.rand(2, 3, 8, 8, 8, generator=generator) > 0.7
    expected = sum(
        weight * region_losses(logits, target[..., ::step, ::step, ::step])
        for logits, weight, step in zip(levels, (4, 2, 1), (1, 2, 4), strict=True)
    )
    torch.testing.assert_close(supervised_losses(levels, target), expected / 7)
    torch.testing.assert_close(supervised_losses(levels[:1], target), region_losses(levels[0], target))
