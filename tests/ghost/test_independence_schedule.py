"""When a clipper checks that examples are independent, and that a check changes nothing else."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memsave.ghost import GhostClipper
from memsave.profiler import MemoryRecorder
from tests.ghost.test_layers import draw, losses_of
from tests.support.per_example_reference import by_loop

pytestmark = pytest.mark.usefixtures("device")


class Counted:
    """Counts the backwards of each step."""

    def __init__(self, monkeypatch):
        grad = torch.autograd.grad
        self.backwards, self.inside = 0, False

        def counted(*arguments, **options):
            if self.inside:  # called again by the mode that sets the default device
                return grad(*arguments, **options)
            self.backwards, self.inside = self.backwards + 1, True
            try:
                return grad(*arguments, **options)
            finally:
                self.inside = False

        monkeypatch.setattr(torch.autograd, "grad", counted)

    def of(self, step):
        self.backwards = 0
        step()
        return self.backwards


def no_random_checks(clipper):
    """Make no check at random steps."""
    clipper._independence._steps_left = 10**9


def test_each_layer_is_checked_once_and_never_with_one_example(monkeypatch):
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x, *, other=False):
            return self.two(x) if other else self.one(x)

    model, count = Either(), Counted(monkeypatch)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    counts = []
    for batch, other in ((1, False), (4, False), (5, False), (4, True), (4, True)):
        counts.append(count.of(lambda b=batch, o=other: clipper.backward(model(torch.randn(b, 3), other=o).sum(1))))
        no_random_checks(clipper)
    assert counts == [1, 5, 1, 5, 1]  # for four examples: two bits, in both directions


def test_layers_are_checked_again_after_each_change_of_mode_and_after_attach(monkeypatch):
    model, count = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0)), Counted(monkeypatch)
    clipper = GhostClipper(model, max_grad_norm=1.0)

    def step():
        found = count.of(lambda: clipper.backward(model(torch.randn(4, 3)).sum(1)))
        no_random_checks(clipper)
        return found

    assert [step(), step()] == [5, 1]
    model.eval()
    assert [step(), step()] == [5, 1]
    model.train()
    with torch.no_grad():  # an evaluation in between is no change
        model.eval()
        model(torch.randn(4, 3))
        model.train()
    assert [step(), step()] == [5, 1]
    clipper.close()
    clipper.attach()
    assert [step(), step()] == [5, 1]


def test_mixing_in_train_mode_is_found_after_a_first_batch_in_eval_mode():
    class OnlyInTraining(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            y = self.layer(x)
            return y - y.mean(0) if self.training else y

    model = OnlyInTraining().double().eval()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    clipper.backward(losses_of(model, draw(4, 3)))
    no_random_checks(clipper)
    model.train()
    with pytest.raises(ValueError, match="examples are not independent at layer"):
        clipper.backward(losses_of(model, draw(4, 3)))


class Centred(nn.Module):
    """Mixes examples before a head that starts at zero."""

    def __init__(self, mixes=True):
        super().__init__()
        self.layer, self.head, self.mixes = nn.Linear(3, 3), nn.Linear(3, 2), mixes
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        y = self.layer(x)
        return self.head(y - y.mean(0) if self.mixes else y)


def test_layers_below_a_head_of_zeros_are_checked_when_a_gradient_reaches_them(monkeypatch):
    model = Centred().double()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    clipper.backward(losses_of(model, draw(4, 3)))
    assert clipper._independence.checked == {"head"}
    no_random_checks(clipper)
    with torch.no_grad():
        model.head.weight += 0.1
    with pytest.raises(ValueError, match="examples are not independent at layer"):
        clipper.backward(losses_of(model, draw(4, 3)))
    independent, count = Centred(mixes=False).double(), Counted(monkeypatch)
    clipper = GhostClipper(independent, max_grad_norm=1.0)

    def step():
        return count.of(lambda: clipper.backward(losses_of(independent, draw(4, 3))))

    assert [step() for _ in range(10)] == [5] * 9 + [3]  # later, fewer checks of unreached layers
    with torch.no_grad():
        independent.head.weight += 0.1
    step()
    assert clipper._independence.checked == {"head", "layer"}


def test_examples_without_a_gradient_and_layers_outside_the_loss_cause_no_further_checks(monkeypatch):
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.aside = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            self.aside(x)
            return self.layer(x)

    model, count = Aside().double(), Counted(monkeypatch)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    wanted = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    counts = []
    for _ in range(2):
        counts.append(count.of(lambda: clipper.backward(losses_of(model, draw(4, 3)) * wanted)))
        no_random_checks(clipper)
    assert counts == [5, 1]


class Sorting(nn.Module):
    """Sorts its rows by length for one layer, as packed sequences are."""

    def __init__(self):
        super().__init__()
        self.look, self.mix, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, ids):
        order = (ids != 0).sum(1).argsort(descending=True, stable=True)
        return self.head(self.mix(self.look(ids)[order]).tanh()[order.argsort()])


def test_sorting_rows_by_length_is_exact_after_batches_that_were_sorted_already():
    torch.manual_seed(0)
    model = Sorting().double()
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    expected, _ = by_loop(model, ids.flip(0), losses_of, max_grad_norm=1.0)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    for _ in range(2):
        clipper.backward(losses_of(model, ids))
    torch.testing.assert_close(clipper.backward(losses_of(model, ids.flip(0))), expected, rtol=1e-9, atol=0)


def test_a_loss_that_mixes_later_is_found():
    model = nn.Linear(3, 2).double()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    for _ in range(3):
        clipper.backward(losses_of(model, draw(4, 3)))
    with pytest.raises(ValueError, match="examples are not independent at the model"):
        for _ in range(257):
            losses = losses_of(model, draw(4, 3))
            clipper.backward(losses / losses.sum())


@pytest.mark.parametrize(
    ("kind", "passes"),
    [
        ("complete", 1),
        ("quick", 2),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("complete", 2), ("quick", 1))),
    ],
)
def test_under_checkpoints_a_check_takes_no_more_memory_than_the_norms(kind, passes):
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)) for _ in range(12)
            )

        def forward(self, x):
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return x

    def peak(check):
        torch.manual_seed(0)
        model = Deep()
        clipper = GhostClipper(model, max_grad_norm=1.0, passes=passes)
        x = torch.randn(16, 64, 32)
        clipper.backward(losses_of(model, x))
        clipper._independence._steps_left = 1 if check == "quick" else 10**9
        if check == "complete":
            clipper._independence.checked.clear()
        with MemoryRecorder(model) as recorder:
            clipper.backward(losses_of(model, x))
        return recorder.report().peak_bytes

    assert peak(kind) <= 1.1 * peak("none")


def test_checks_at_random_steps_change_no_random_numbers():
    def run(wait):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 2)).double()
        clipper = GhostClipper(model, max_grad_norm=0.1)
        for _ in range(5):
            clipper._independence._steps_left = wait
            clipper.backward(losses_of(model, draw(4, 3)))
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    assert torch.equal(run(1), run(100))


def test_an_example_that_is_not_finite_does_not_count_as_mixing():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3)).double()
    x = draw(4, 3)
    x[1:3] = torch.tensor([[float("nan")], [float("inf")]])
    clipper = GhostClipper(model, max_grad_norm=1.0)
    clipper.backward(losses_of(model, x))
    assert clipper.nonfinite == 2
