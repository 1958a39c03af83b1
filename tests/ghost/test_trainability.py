"""Which parameters are trainable is read at each forward: layers may be frozen, unfrozen, added and switched."""

from functools import partial

import pytest
import torch
from torch import nn

from memsave.ghost import GhostClipper
from tests.ghost.test_layers import draw, losses_of
from tests.support.per_example_reference import by_loop

pytestmark = pytest.mark.usefixtures("device")

BOUND = 0.3


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def assert_as_if_frozen_before(make, model, clipper, batch, clipping="flat"):
    """The clipper agrees with a model in which the same parameters were frozen from the start."""
    twin = make()
    twin.load_state_dict(model.state_dict())
    for name, p in model.named_parameters():
        twin.get_parameter(name).requires_grad_(p.requires_grad)
    norms, sums = by_loop(twin, batch, losses_of, max_grad_norm=BOUND, clipping=clipping)
    ours = clipper.backward(losses_of(model, batch))
    torch.testing.assert_close(ours.detach(), norms, rtol=1e-9, atol=0)
    for name, p in model.named_parameters():
        if name in sums:
            torch.testing.assert_close(p.grad, sums[name], rtol=1e-9, atol=1e-14)
        else:
            assert p.grad is None, name


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_a_layer_frozen_after_attaching_adds_no_norm_and_gets_no_gradient(passes, clipping):
    model, batch = small(), draw(5, 4)
    clipper = GhostClipper(model, max_grad_norm=BOUND, passes=passes, clipping=clipping)
    model[0].requires_grad_(False)
    assert_as_if_frozen_before(small, model, clipper, batch, clipping)


def test_a_layer_frozen_after_attaching_leaves_its_group():
    model, batch = small(), draw(5, 4)
    clipper = GhostClipper(model, max_grad_norm=BOUND, clipping="per_layer")
    model[0].requires_grad_(False)
    assert_as_if_frozen_before(small, model, clipper, batch)  # one group: as flat clipping


def test_a_frozen_layer_does_not_move_in_the_documented_loop():
    model = small()
    clipper = GhostClipper(model, max_grad_norm=BOUND)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    clipper.backward(losses_of(model, draw(5, 4)))
    optimizer.step()
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_layer_frozen_between_two_micro_batches_loses_its_sum_and_one_unfrozen_gains_one(passes):
    model, batch = small(), draw(5, 4)
    model[2].requires_grad_(False)
    clipper = GhostClipper(model, max_grad_norm=BOUND, passes=passes)
    clipper.backward(losses_of(model, batch))
    assert model[0].weight.grad.any()
    model.zero_grad()
    clipper.backward(losses_of(model, batch))
    model[0].requires_grad_(False)
    model[2].requires_grad_(True)
    assert_as_if_frozen_before(small, model, clipper, batch)


def test_one_parameter_of_a_layer_may_be_frozen():
    model, batch = small(), draw(5, 4)
    clipper = GhostClipper(model, max_grad_norm=BOUND)
    model[0].weight.requires_grad_(False)
    assert_as_if_frozen_before(small, model, clipper, batch)


def test_freezing_between_forward_and_backward_is_refused_by_name():
    model = small()
    clipper = GhostClipper(model, max_grad_norm=BOUND)
    losses = losses_of(model, draw(5, 4))
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"0\.weight, 0\.bias: each was frozen between its forward and this backward"):
        clipper.backward(losses)
    assert all(p.grad is None for p in model.parameters())


class Toggling(nn.Module):
    """Its layer is frozen for one of two uses."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.layer(x).tanh()
        self.layer.requires_grad_(False)
        x = self.layer(x).tanh()
        self.layer.requires_grad_(True)
        return self.head(x)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_layer_frozen_for_one_of_two_uses_in_a_forward_is_exact(passes):
    torch.manual_seed(0)
    model = Toggling().double()
    batch = draw(5, 4)
    clipper = GhostClipper(model, max_grad_norm=BOUND, passes=passes)
    assert_as_if_frozen_before(lambda: Toggling().double(), model, clipper, batch)


def test_a_layer_without_a_rule_may_be_frozen_too():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.PReLU(4), nn.Linear(4, 3)).double()

    model = make()
    clipper = GhostClipper(model, max_grad_norm=BOUND)
    model[1].requires_grad_(False)
    assert_as_if_frozen_before(make, model, clipper, draw(5, 4))


def test_a_layer_that_is_added_later_is_clipped_too():
    model, batch = small(), draw(5, 4)
    clipper = GhostClipper(model, max_grad_norm=BOUND)
    clipper.backward(losses_of(model, batch))
    model.zero_grad(set_to_none=True)
    model.append(nn.Linear(3, 2).double())
    assert_as_if_frozen_before(lambda: small().append(nn.Linear(3, 2).double()), model, clipper, batch)


def test_adapters_may_be_switched_and_added_while_the_clipper_is_attached():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)

    def make(adapter):
        model = peft.get_peft_model(small(), config)
        model.add_adapter("other", config)
        model.set_adapter(adapter)
        return model.double()

    model, batch = make("default"), draw(5, 4)
    clipper = GhostClipper(model, max_grad_norm=BOUND)
    for adapter in ("default", "other", "default"):
        model.zero_grad(set_to_none=True)
        model.set_adapter(adapter)
        assert_as_if_frozen_before(partial(make, adapter), model, clipper, batch)
        assert all(f".{adapter}." in name for name, p in model.named_parameters() if p.grad is not None)
    plain = small()  # adapters that come after the clipper
    clipper = GhostClipper(plain, max_grad_norm=BOUND)
    adapted = peft.get_peft_model(plain, config).double()
    norms = clipper.backward(losses_of(plain, batch))
    twin = peft.get_peft_model(small(), config).double()
    twin.load_state_dict(adapted.state_dict())
    torch.testing.assert_close(norms, by_loop(twin, batch, losses_of, max_grad_norm=BOUND)[0], rtol=1e-9, atol=0)


class Switched(nn.Module):
    """Examples are independent until `mixes` is set."""

    def __init__(self):
        super().__init__()
        self.layer, self.head, self.mixes = nn.Linear(4, 4), nn.Linear(4, 3), False

    def forward(self, x):
        x = self.layer(x).tanh()
        return self.head(x - x.mean(0) if self.mixes else x)


def test_a_layer_that_replaces_another_one_is_checked_in_its_first_backward():
    model, batch = Switched().double(), draw(5, 4)
    clipper = GhostClipper(model, max_grad_norm=BOUND)
    clipper.backward(losses_of(model, batch))
    clipper._independence._steps_left = 10**9  # the next check is far away
    model.layer, model.mixes = nn.Linear(4, 4).double(), True
    with pytest.raises(ValueError, match="examples are not independent"):
        clipper.backward(losses_of(model, batch))
