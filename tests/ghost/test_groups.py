"""Per-layer clipping against one backward per example, and the memory budget."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memsave.ghost import GhostClipper, gradient_products, verify
from memsave.ghost.gradient_products import cheapest_form
from memsave.ghost.gradients import FactoredGrad, PerSampleGrad
from memsave.ghost.groups import groups_by_layer
from memsave.profiler import MemoryRecorder
from tests.ghost.test_clipper import Checkpointed, small
from tests.ghost.test_head import Both, Speaker, chunked
from tests.ghost.test_head import draw as text
from tests.ghost.test_layers import draw, losses_of

pytestmark = pytest.mark.usefixtures("device")

SMALL = [["0.weight", "0.bias"], ["3.weight", "3.bias"]]
CHECKPOINTED = [[f"{name}.weight", f"{name}.bias"] for name in ("first", "body.0", "body.3", "last")]
TIED = [["look.weight", "head.bias"], ["mix.weight", "mix.bias"]]
UNTIED = [["look.weight"], ["head.weight", "head.bias"], ["mix.weight", "mix.bias"]]


def by_groups(model, batch, losses, groups, *, bound):
    """Clipped sums by name, and the norms, of one backward per example."""
    torch.manual_seed(0)
    named = dict(model.named_parameters())
    assert sorted(named) == sorted(name for group in groups for name in group)
    sums, norms = {name: torch.zeros_like(p) for name, p in named.items()}, []
    for loss in losses(model, batch):
        found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
        gradients = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}
        for group in groups:
            norm = torch.stack([gradients[name].square().sum() for name in group]).sum().sqrt()
            for name in group:
                sums[name] += (bound / len(groups) ** 0.5 / norm).clamp(max=1.0) * gradients[name]
        norms.append(torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt())
    return torch.stack(norms), sums


CASES = {
    "small": (small, SMALL, lambda: draw(4, 4), losses_of),
    "checkpoints": (Checkpointed, CHECKPOINTED, lambda: draw(4, 4), losses_of),
    "tied head": (lambda: Speaker(bias=True), TIED, text, chunked),
    "head": (lambda: Speaker(bias=True, tied=False), UNTIED, text, chunked),
    "one example": (lambda: Speaker(bias=True), TIED, lambda: text(1), chunked),
    "a head used twice": (lambda: Both(bias=True), TIED, text, chunked),
}


@pytest.mark.parametrize("name", CASES)
def test_each_layer_is_clipped_to_its_share(name):
    make, groups, make_batch, losses = CASES[name]
    torch.manual_seed(0)
    model, batch = make().double(), make_batch()
    free, _ = by_groups(model, batch, losses, groups, bound=1.0)
    for bound in (free.max().item(), free.max().item() / 4):
        norms, sums = by_groups(model, batch, losses, groups, bound=bound)
        clipper = GhostClipper(model, max_grad_norm=bound, clipping="per_layer")
        for _ in range(2):  # the second adds to the first
            torch.manual_seed(0)
            torch.testing.assert_close(clipper.backward(losses(model, batch)), norms, rtol=1e-9, atol=1e-12)
        assert clipper.chosen_passes == 1
        clipper.close()
        for key, total in sums.items():
            found = model.get_parameter(key).grad
            assert (found - 2 * total).norm() <= 1e-9 * total.norm() + 1e-12 * bound, key
        model.zero_grad()


def test_direct_clips_each_layer_to_its_share():
    model, x = small().eval(), draw(1, 4)
    norms, sums = by_groups(model, x, losses_of, SMALL, bound=0.1)
    clipper = GhostClipper(model, max_grad_norm=0.1, clipping="per_layer", passes="direct")
    torch.testing.assert_close(clipper.backward(losses_of(model, x)), norms)
    for name, total in sums.items():
        torch.testing.assert_close(model.get_parameter(name).grad, total, rtol=1e-9, atol=1e-13)


def test_the_whole_gradient_is_within_the_bound_and_clipped_examples_are_reported():
    model = small().float()
    clipper = GhostClipper(model, max_grad_norm=0.1, clipping="per_layer")
    clipper.backward(losses_of(model, draw(1, 4).float()))
    assert torch.cat([p.grad.flatten() for p in model.parameters()]).norm() <= 0.1 * (1 + 1e-5)
    assert clipper.clipped.tolist() == [True]
    clipper.max_grad_norm = 1e6
    clipper.backward(losses_of(model, draw(3, 4).float()))
    assert clipper.clipped.tolist() == [False] * 3
    clipper.backward(torch.zeros(0, requires_grad=True))
    assert clipper.clipped.tolist() == []


def test_a_group_whose_norm_is_not_finite_adds_zero():
    model, x = small().eval(), draw(3, 4)
    x[1] = float("nan")
    clipper = GhostClipper(model, max_grad_norm=0.1, clipping="per_layer")
    clipper.backward(losses_of(model, x))
    ours = [p.grad.clone() for p in model.parameters()]
    clipper.close()
    _, sums = by_groups(model, x[::2], losses_of, SMALL, bound=0.1)
    assert clipper.nonfinite == 1
    for one, other in zip(ours, sums.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)


def test_a_group_with_an_unused_layer_is_clipped_after_the_backward():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight

        def forward(self, x):
            self.two(x)
            return self.one(x)

    torch.manual_seed(0)
    model, x = Spare().double(), draw(3, 4)
    groups = [["one.weight", "one.bias", "two.bias"]]
    norms, sums = by_groups(model, x, losses_of, groups, bound=0.3)
    clipper = GhostClipper(model, max_grad_norm=0.3, clipping="per_layer")
    torch.testing.assert_close(clipper.backward(losses_of(model, x)), norms)
    for name, total in sums.items():
        torch.testing.assert_close(model.get_parameter(name).grad, total, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("options", [{"clipping": "per_layer"}, {"passes": 1}, {"passes": "direct"}], ids=str)
def test_two_gradients_that_share_one_tensor_are_not_scaled_twice(batch, options):
    """Of a layer without a rule: both parameters' gradients are its output's, which goes on to the first layer."""

    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = (nn.Parameter(torch.zeros(1, 4)) for _ in range(2))  # nothing is summed

        def forward(self, x):
            return x + self.one + self.two

    if options.get("passes") == "direct" and batch > 1:
        return
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), Shift()).double(), draw(batch, 4)
    groups = [["0.weight", "0.bias"], ["1.one", "1.two"]]
    groups = groups if "clipping" in options else [[*groups[0], *groups[1]]]
    norms, sums = by_groups(model, x, losses_of, groups, bound=0.1)
    clipper = GhostClipper(model, max_grad_norm=0.1, **options)
    torch.testing.assert_close(clipper.backward(losses_of(model, x)), norms)
    for name, total in sums.items():
        torch.testing.assert_close(model.get_parameter(name).grad, total, rtol=1e-9, atol=1e-13)


def test_per_layer_clipping_refuses_two_passes():
    with pytest.raises(ValueError, match=r'clipping="per_layer" forms its sums in one pass; give passes="auto"'):
        GhostClipper(small(), max_grad_norm=1.0, clipping="per_layer", passes=2)


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
def test_verify_accepts_and_checks_every_clipping(clipping, monkeypatch):
    batch = {"ids": text()["ids"], "targets": text()["targets"]}
    assert verify(Speaker().double(), batch, chunked, clipping=clipping).ok
    monkeypatch.setattr(GhostClipper, "_clip_factors", lambda clipper, norms: torch.ones_like(norms) / 2)
    assert not verify(Speaker().double(), batch, chunked, clipping=clipping).ok


def test_groups_do_not_depend_on_the_order_of_sharing():
    one, two, three = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    two.bias, two.weight = one.bias, three.weight
    groups = groups_by_layer(nn.ModuleList([one, three, two, nn.Linear(2, 2)]))
    assert sorted(len(group) for group in groups.members) == [2, 4]
    assert groups.bound_of_each(1.0) == pytest.approx(2**-0.5)


def test_per_layer_clipping_has_a_lower_memory_peak_than_flat_clipping():
    """Flat clipping in one pass keeps all gradients until the end."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(16)])
    peaks = {}
    for clipping in ("flat", "per_layer"):
        clipper = GhostClipper(model, max_grad_norm=1.0, clipping=clipping, passes=1)
        x = torch.randn(64, 8, 16)
        with MemoryRecorder(model) as recorder:
            clipper.backward(model(x).sum((1, 2)))
        peaks[clipping] = recorder.report().peak_bytes
        clipper.close()
        model.zero_grad()
    assert peaks["per_layer"] < 0.75 * peaks["flat"]


def test_a_memory_budget_allows_formed_gradients_where_they_are_faster():
    with torch.device("meta"):
        gradient = FactoredGrad(torch.empty(64, 512, 768), torch.empty(64, 512, 3072))
    more = 4 * (63 * 768 * 3072 - 64 * 512 * (768 + 3072))
    assert isinstance(cheapest_form(gradient, summed=True, bytes_left=more - 4), FactoredGrad)
    assert isinstance(cheapest_form(gradient, summed=True, bytes_left=more), PerSampleGrad)


def test_the_plan_reports_kept_bytes_within_the_memory_budget(monkeypatch):
    monkeypatch.setattr(gradient_products, "WRITE", 0)
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)])
    factors, formed = 64 * 15 * (32 + 32) * 4, 64 * 32 * 32 * 4
    more = formed - formed // 64 - factors  # one of the kept gradients becomes the sum
    for budget, count in ((0, 0), (2 * more, 2), (3 * more - 1, 2), (100 * more, 4)):
        clipper = GhostClipper(model, max_grad_norm=1.0, memory_budget=budget, passes=1)
        clipper.backward(model(torch.randn(64, 15, 32)).sum((1, 2)))
        plan = [("gradients formed", formed)] * count + [("Gram matrices", factors)] * (4 - count)
        assert clipper.plan == {f"{3 - number}.weight": each for number, each in enumerate(plan)}
        clipper.close()


@pytest.mark.parametrize("grads", [False, True])
def test_one_example_under_checkpoints_takes_one_pass_if_its_gradient_fits_the_budget(grads):
    model = Checkpointed().double()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    if grads:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    clipper.backward(losses_of(model, draw(1, 4)))
    assert clipper.chosen_passes == (2 if grads else 1)
    clipper.memory_budget = 10**6
    clipper.backward(losses_of(model, draw(1, 4)))
    assert clipper.chosen_passes == 1


def test_two_passes_add_each_use_to_grad_without_a_copy():
    layer = nn.Linear(64, 64)

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return checkpoint(lambda y: self.layer(self.layer(self.layer(y))), x, use_reentrant=False)

    model = Shared()
    clipper = GhostClipper(model, max_grad_norm=1.0, passes=2)
    with MemoryRecorder(model) as recorder:
        clipper.backward(model(torch.randn(2, 64)).sum(1))
    assert recorder.report().peak_bytes < 2.5 * recorder.report().peak_by_category["parameter"]
