"""A layer may pass something besides its output to the loss, such as an attribute or a tensor from a hook."""

import pytest
import torch
from torch import nn

from memsave.ghost import GhostClipper
from tests.ghost.test_layers import draw, losses_of
from tests.support.per_example_reference import assert_exact, by_loop

pytestmark = pytest.mark.usefixtures("device")


class Inner(nn.Module):
    """A layer with a parameter and a child, which keeps an auxiliary loss."""

    def __init__(self, keep):
        super().__init__()
        self.scale, self.child, self.keep = nn.Parameter(torch.rand(3)), nn.Linear(3, 3), keep
        self.auxiliary = None

    def forward(self, x):
        y = self.child(x * self.scale)
        self.auxiliary = {"loss": [self.keep(y.square().flatten(1).sum(1))]}
        return y.tanh()


class Model(nn.Module):
    def __init__(self, keep=lambda loss: loss):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.inner, self.head = nn.Linear(3, 3), Inner(keep), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.inner(self.stem(x)))


def taken_from(model):
    """The auxiliary loss, which is removed from the model so that the model can be copied."""
    auxiliary, model.inner.auxiliary = model.inner.auxiliary, None
    return auxiliary["loss"][0]


def without_auxiliary(model, batch):
    losses = losses_of(model, batch)
    taken_from(model)
    return losses


def with_auxiliary(model, batch):
    losses = losses_of(model, batch)
    return losses + 0.1 * taken_from(model)


@pytest.mark.parametrize("passes", [1, 2])
def test_an_auxiliary_loss_that_is_kept_as_an_attribute_is_exact(passes):
    assert_exact(Model().double(), draw(4, 3), with_auxiliary, passes=(passes,))


def test_an_auxiliary_loss_that_is_detached_or_not_used_is_exact():
    assert_exact(Model(torch.Tensor.detach).double(), draw(4, 3), with_auxiliary)
    assert_exact(Model().double(), draw(4, 3), without_auxiliary)


def test_a_tensor_from_a_hook_inside_a_layer_is_exact():
    model, taken = Model().double(), []
    model.inner.child.register_forward_hook(lambda module, args, output: taken.append(output))

    def losses(m, batch):
        taken.clear()
        return without_auxiliary(m, batch) + taken[0].square().sum(1)

    assert_exact(model, draw(4, 3), losses)


def test_a_side_output_that_a_later_layer_uses_is_exact():
    class Skips(Model):
        def forward(self, x):
            y = self.inner(self.stem(x))
            return self.head(y + self.inner.auxiliary["loss"][0][:, None])

    assert_exact(Skips().double(), draw(4, 3), without_auxiliary)


def test_hooks_on_parameters_are_refused_unless_they_only_observe():
    model = Model().double()
    hook = model.stem.weight.register_hook(lambda grad: grad * 2)
    with pytest.raises(ValueError, match=r"stem\.weight has a gradient hook, which would not be called"):
        GhostClipper(model, max_grad_norm=1.0)
    hook.remove()
    GhostClipper(model, max_grad_norm=1.0)
    model.head.bias.register_post_accumulate_grad_hook(lambda p: p.grad.zero_())
    with pytest.raises(ValueError, match=r"head\.bias has a gradient hook"):
        model(draw(4, 3))


def test_a_tensor_from_a_hook_on_a_layer_itself_is_exact():
    model, taken = Model(torch.Tensor.detach).double(), []
    model.stem.register_forward_hook(lambda module, args, output: taken.append(output))

    def losses(m, batch):
        taken.clear()
        return without_auxiliary(m, batch) + taken[0].square().sum(1)

    assert_exact(model, draw(4, 3), losses)


class Effective(nn.Module):
    """Keeps the weight that it computed."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        self.effective = self.weight / self.weight.norm()
        return x @ self.effective.T


class ReadsAnother(nn.Module):
    """Uses what another layer kept."""

    def __init__(self, other):
        super().__init__()
        self.scale, self.other = nn.Parameter(torch.rand(3)), [other]

    def forward(self, x):
        return x @ self.other[0].effective.T * self.scale


def test_an_attribute_that_another_layer_without_a_rule_reads_is_exact():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = Effective()
            self.second = ReadsAnother(self.first)

        def forward(self, x):
            y = self.second(self.first(x))
            self.first.effective = None  # so that the model can be copied
            return y

    torch.manual_seed(0)
    model = Model().double()
    model.second.other = [model.first]
    norms, sums = by_loop(model, draw(4, 3), losses_of, max_grad_norm=1.0)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    torch.testing.assert_close(clipper.backward(losses_of(model, draw(4, 3))), norms, rtol=1e-9, atol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, sums[name], rtol=1e-9, atol=1e-12)
