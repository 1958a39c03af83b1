"""docs/ghost.md: its code runs, and its statements about Opacus hold."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from memsave.ghost import GhostClipper
from memsave.ghost.rule import registered_rule
from tests.ghost.test_clipper import small
from tests.ghost.test_layers import draw
from tests.support.per_example_reference import assert_exact, by_loop

pytest.importorskip("opacus")
from opacus.accountants import RDPAccountant
from opacus.data_loader import DPDataLoader
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.batch_memory_manager import BatchMemoryManager

PAGE = Path(__file__).parents[2] / "docs" / "ghost.md"
BOUND, EXPECTED = 0.2, 5  # of the actual batches, none has 5 examples


def losses_of(model, batch):
    return model(batch).sin().flatten(1).sum(1)


def private(model, *, noise_multiplier=0.0, kind=DPOptimizerFastGradientClipping):
    """(clipper, Opacus's optimizer around SGD with a learning rate of 1)."""
    clipper = GhostClipper(model, max_grad_norm=BOUND)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    bounds = {"max_grad_norm": clipper.max_grad_norm, "expected_batch_size": EXPECTED}
    return clipper, kind(sgd, noise_multiplier=noise_multiplier, **bounds)


def steps_of(model, before):
    """What SGD subtracted, by parameter name."""
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


def state_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def clipped_mean(model, batch):
    """From one backward per example."""
    norms, sums = by_loop(model, batch, losses_of, max_grad_norm=BOUND)
    assert (norms > BOUND).any()
    return {name: total / EXPECTED for name, total in sums.items()}


def assert_same(steps, expected):
    assert steps.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(steps[name], value, rtol=1e-9, atol=1e-13)


def test_the_code_on_the_page_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 6
    torch.manual_seed(0)
    names = {"__name__": "page"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), names)
    assert names["norms"].shape == (8,) and names["norms_of_persons"].shape == (3,)
    assert sum(count for *_, count in names["accountant"].history) == len(names["loader"]) == 20
    assert 0 < names["epsilon"] < 20


def test_the_rule_on_the_page_is_exact():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if "@register_rule" in block]
    names = {"__name__": "page"}
    exec(compile(block, PAGE.name, "exec"), names)
    layer = names["Scale"](4)
    assert registered_rule(layer) is names["scale"]
    assert_exact(nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 2)).double(), draw(3, 5, 4), losses_of)


def test_without_noise_a_step_is_the_clipped_mean():
    model, x = small().eval(), draw(6, 4)
    expected, before = clipped_mean(model, x), state_of(model)
    clipper, noisy = private(model)
    clipper.backward(losses_of(model, x))
    noisy.step()
    assert_same(steps_of(model, before), expected)


def test_the_noise_has_the_deviation_that_is_accounted_for():
    torch.manual_seed(0)
    model, x = nn.Linear(200, 200).double(), draw(6, 200)
    expected, before = clipped_mean(model, x), state_of(model)
    clipper, noisy = private(model, noise_multiplier=1.7)
    clipper.backward(losses_of(model, x))
    noisy.step()
    noise = steps_of(model, before)["weight"] - expected["weight"]  # 40000 draws: the deviation to 0.35%
    assert noise.std().item() == pytest.approx(1.7 * BOUND / EXPECTED, rel=0.02)
    assert abs(noise.mean().item()) < 5 * 1.7 * BOUND / EXPECTED / 200


@pytest.mark.parametrize("skip", [False, True], ids=["in .grad", "by signal_skip_step"])
def test_micro_batches_add_up_to_one_step(skip):
    model, x = small().eval(), draw(6, 4)
    expected, before = clipped_mean(model, x), state_of(model)
    clipper, noisy = private(model)
    accountant = RDPAccountant()
    noisy.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=0.1))
    first, last = x.split([4, 2])
    clipper.backward(losses_of(model, first))
    if skip:
        noisy.signal_skip_step(True)
        noisy.step()
        noisy.zero_grad()
        assert_same(steps_of(model, before), {name: torch.zeros_like(p) for name, p in before.items()})
        noisy.signal_skip_step(False)
    clipper.backward(losses_of(model, last))
    noisy.step()
    assert_same(steps_of(model, before), expected)
    assert accountant.history == [(0.0, 0.1, 1)]


def test_opacus_memory_manager_splits_a_logical_batch():
    model, x = small().eval(), draw(6, 4)
    expected, before = clipped_mean(model, x), state_of(model)
    clipper, noisy = private(model)
    everyone = DPDataLoader(TensorDataset(x), sample_rate=1.0)  # one logical batch
    sizes = []
    with BatchMemoryManager(data_loader=everyone, max_physical_batch_size=2, optimizer=noisy) as parts:
        for (part,) in parts:
            sizes.append(len(part))
            clipper.backward(losses_of(model, part))
            noisy.step()
            noisy.zero_grad()
    assert sizes == [2, 2, 2]
    assert_same(steps_of(model, before), expected)


def test_an_empty_batch_is_a_step_of_noise_alone():
    torch.manual_seed(0)
    model = nn.Linear(200, 200).double()
    before = state_of(model)
    clipper, noisy = private(model, noise_multiplier=1.7)
    for parameter in clipper.parameters:
        parameter.grad = torch.zeros_like(parameter)
    noisy.step()
    assert steps_of(model, before)["weight"].std().item() == pytest.approx(1.7 * BOUND / EXPECTED, rel=0.02)


def test_without_zero_grad_after_a_skipped_step_the_first_micro_batch_counts_twice():
    model, x = small().eval(), draw(6, 4)
    first, last = x.split([4, 2])
    once = clipped_mean(model, x)
    _, more = by_loop(model, first, losses_of, max_grad_norm=BOUND)
    before = state_of(model)
    clipper, noisy = private(model)
    clipper.backward(losses_of(model, first))
    noisy.signal_skip_step(True)
    noisy.step()
    noisy.signal_skip_step(False)
    clipper.backward(losses_of(model, last))
    noisy.step()
    assert_same(steps_of(model, before), {name: value + more[name] / EXPECTED for name, value in once.items()})


def test_the_optimizer_for_per_example_gradients_is_refused():
    model = small()
    clipper, noisy = private(model, kind=DPOptimizer)
    clipper.backward(losses_of(model, draw(2, 4)))
    with pytest.raises(ValueError, match="Per sample gradient not found"):
        noisy.step()
