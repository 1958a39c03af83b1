"""The private gradient: clipping, noise, division by the expected size, counting, and checkpoints."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from memsave.privacy import Mechanism, PrivacyError, PrivateGradients

pytest.importorskip("opacus")


def model_of(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def private_of(model, *, noise_multiplier=0.0, seed=0, **options):
    return PrivateGradients(model, Mechanism(40, 8, noise_multiplier, 0.5, delta=1e-3), seed=seed, **options)


def losses_of(model, x):
    return model(x).sin().sum(1)


def whole_batches(model, *, size, noise_multiplier=0.0, **options):
    """PrivateGradients with q = 1, so every batch has all examples; the first batch is drawn."""
    private = PrivateGradients(model, Mechanism(size, size, noise_multiplier, 0.5, delta=1e-3), seed=0, **options)
    assert next(private.batches()) == list(range(size))
    return private


X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def examples_on_device(device, monkeypatch):
    """Run every test of this file on every device."""
    monkeypatch.setitem(globals(), "X", X.to(device))


def one_step(model, private):
    """Draw a batch and compute its private gradient."""
    indices = next(private.batches())
    private.backward(losses_of(model, X[indices]))
    private.finish()


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def test_an_infinite_loss_counts_as_nonfinite_only_if_its_example_counts():
    for counted, nonfinite in ((None, 2), (torch.tensor([True, True, False]), 1)):
        model = model_of()
        private = whole_batches(model, size=3 if counted is None else 2)
        x = X[:3] * torch.tensor([[1.0], [torch.inf], [torch.inf]], device=X.device)
        private.backward(losses_of(model, x), counted=counted)
        assert private.nonfinite == nonfinite


def test_without_noise_the_gradient_is_the_clipped_sum_over_the_expected_size():
    model = model_of()
    private = whole_batches(model, size=6)
    for part in X[:6].split(4):
        private.backward(losses_of(model, part))
    private.finish()
    ours = gradients(model)
    private.close()
    total = [torch.zeros_like(p) for p in model.parameters()]
    for x in X[:6]:
        gradient = torch.autograd.grad(losses_of(model, x[None])[0], list(model.parameters()))
        norm = torch.cat([g.flatten() for g in gradient]).norm()
        for each, g in zip(total, gradient, strict=True):
            each += g * (0.5 / norm).clamp(max=1)
    for one, other in zip(ours, total, strict=True):
        torch.testing.assert_close(one, other / 6, rtol=1e-4, atol=1e-7)
    assert private.examples == 6
    assert 0 < private.clipped <= 6


def test_an_empty_batch_is_a_step_of_pure_noise():
    model = model_of()
    private = PrivateGradients(model, Mechanism(40, 1, 2.0, 0.5, delta=1e-3), seed=0)
    while next(private.batches()):  # one batch in three is empty
        private.guard.reset()
    private.finish()
    drawn = torch.cat([g.flatten() for g in gradients(model)])
    assert drawn.std().item() == pytest.approx(2.0 * 0.5, rel=0.3)
    assert private.steps == 1
    assert private.epsilon > 0


@pytest.mark.parametrize("parts", [1, 2, 6])
def test_noise_is_added_once_however_the_batch_is_split(parts):
    model = model_of()
    private = whole_batches(model, size=6, noise_multiplier=1.0)
    for part in X[:6].chunk(parts):
        private.backward(losses_of(model, part))
    private.finish()
    whole = model_of()
    other = whole_batches(whole, size=6, noise_multiplier=1.0)
    other.backward(losses_of(whole, X[:6]))
    other.finish()
    for one, another in zip(gradients(model), gradients(whole), strict=True):
        torch.testing.assert_close(one, another, rtol=1e-4, atol=1e-6)


def steps(model, private, count):
    for _ in range(count):
        one_step(model, private)
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
                p.grad = None


def test_a_restored_state_continues_bit_for_bit():
    model = model_of()
    private = private_of(model, noise_multiplier=1.0)
    steps(model, private, 2)
    state, weights = private.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    steps(model, private, 3)
    again = model_of()
    continued = private_of(again, noise_multiplier=1.0, seed=1)  # another seed: the restored state must decide
    continued.load_state_dict(state)
    again.load_state_dict(weights)
    steps(again, continued, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert (continued.steps, continued.epsilon) == (private.steps, private.epsilon)


def test_unseeded_runs_differ():
    noises = []
    for _ in range(2):
        model = model_of()
        one_step(model, private_of(model, noise_multiplier=1.0, seed=None))
        noises.append(torch.cat([g.flatten() for g in gradients(model)]))
    assert not torch.equal(*noises)


def test_another_mechanism_cannot_be_continued():
    state = private_of(model_of(), noise_multiplier=1.0).state_dict()
    with pytest.raises(PrivacyError, match=r"made with noise_multiplier=1\.0, and this run has 0\.5"):
        private_of(model_of(), noise_multiplier=0.5).load_state_dict(state)


def test_a_seeded_run_stays_seeded_when_it_is_continued():
    state = private_of(model_of(), seed=0).state_dict()
    continued = private_of(model_of(), seed=None)
    assert not continued.seeded
    continued.load_state_dict(state)
    assert continued.seeded
    with pytest.raises(PrivacyError, match="made with secure_noise=False, and this run has True"):
        private_of(model_of(), secure_noise=True).load_state_dict(state)


@pytest.mark.parametrize("passes", ["auto", "direct"])
def test_parameters_that_are_unfrozen_later_are_refused(passes):
    model = model_of()
    model[0].requires_grad_(False)
    private = private_of(model, passes=passes)
    model[0].requires_grad_(True)
    with pytest.raises(PrivacyError, match="would get no noise"):
        private.backward(losses_of(model, X[:1]))
    with pytest.raises(PrivacyError, match="would get no noise"):
        private.finish()


def test_a_sum_that_failed_half_way_is_neither_noised_nor_counted(monkeypatch):
    from memsave.ghost import ledger

    model = model_of()
    private = whole_batches(model, size=3)
    add_sum, calls = ledger.add_sum, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")
        add_sum(*args)

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "add_sum", failing)
        with pytest.raises(torch.OutOfMemoryError):
            private.backward(losses_of(model, X[:3]))
    with pytest.raises(PrivacyError, match=r"holds only some of its examples; clear the gradients"):
        private.finish()
    assert private.steps == 0
    model.zero_grad()
    private.backward(losses_of(model, X[:3]))
    private.finish()
    assert private.steps == 1


def test_an_ordinary_backward_is_possible_only_while_paused():
    model = model_of()
    private = private_of(model)
    with private.paused():
        losses_of(model, X[:2]).sum().backward()
    assert all(p.grad is None for p in model.parameters())  # gradients without clipping are dropped
    with pytest.raises(RuntimeError, match="ordinary backward"):
        losses_of(model, X[:2]).sum().backward()


def test_half_precision_parameters_are_refused():
    with pytest.raises(PrivacyError, match=r"0\.weight is torch\.bfloat16.*train in float32"):
        private_of(model_of(torch.bfloat16))
    with pytest.raises(PrivacyError, match="no trainable parameter"):
        private_of(model_of().requires_grad_(False))


def test_the_code_of_the_guide_runs_and_spends_its_target(capsys):
    page = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(code, {})
    epsilon = float(capsys.readouterr().out.split()[1])
    assert 2.95 <= epsilon <= 3


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_batches_drawn_ahead_are_drawn_again_by_a_continued_run(ahead):
    def steps(private, model, *, count, drawn, used):
        """Take `count` steps while `ahead` more batches than those in use are drawn; lists what is used."""
        batches, waiting = private.batches(), []
        for _ in range(count):
            while len(waiting) <= ahead:
                waiting.append(next(batches))
                drawn.append(waiting[-1])
            indices = waiting.pop(0)
            used.append(indices)
            if indices:
                private.backward(model(torch.ones(len(indices), 3, dtype=torch.float64)).square().sum(1))
            private.finish()
            model.zero_grad()

    def fresh():
        torch.manual_seed(0)
        model = nn.Linear(3, 2).double()
        return PrivateGradients(model, Mechanism(20, 5, 1.0, 1.0, delta=1e-3), seed=3), model

    whole, used, drawn, rest = [], [], [], []
    steps(*fresh(), count=6, drawn=[], used=whole)
    private, model = fresh()
    steps(private, model, count=2, drawn=drawn, used=used)
    with private.rehearsal():  # which leaves drawn batches drawn
        pass
    state = private.state_dict()
    continued, other = fresh()
    continued.load_state_dict(state)
    steps(continued, other, count=4, drawn=[], used=rest)
    assert len(drawn) == 2 + ahead
    assert used + rest == whole


def _linear_run(seed):
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    return PrivateGradients(model, Mechanism(12, 3, 1.0, 1.0, delta=1e-3), seed=seed), model


def _take_step(private, model, indices):
    if indices:
        private.backward(model(torch.ones(len(indices), 3, dtype=torch.float64)).square().sum(1))
    private.finish()
    model.zero_grad()


def test_a_continued_run_does_not_reuse_a_batch_that_a_second_iterator_drew():
    private, model = _linear_run(seed=3)
    first, second = private.batches(), private.batches()
    used, _, _ = (next(first) for _ in range(3))
    _take_step(private, model, used)
    later = [next(second) for _ in range(3)]
    _take_step(private, model, later[0])  # of the size of the batch that was drawn second
    assert len(later[0]) > 0
    state = private.state_dict()
    continued, _ = _linear_run(seed=3)
    continued.load_state_dict(state)
    drawn = [next(continued.batches()) for _ in range(4)]
    assert later[0] not in drawn


def test_an_iterator_refuses_to_go_on_after_its_batches_were_discarded():
    private, model = _linear_run(seed=0)
    state, batches = private.state_dict(), private.batches()
    next(batches), next(batches)
    private.load_state_dict(state)
    with pytest.raises(PrivacyError, match="iterate over a new"):
        next(batches)
    _take_step(private, model, next(private.batches()))


def test_an_iterator_goes_on_after_a_load_that_discards_nothing():
    private, model = _linear_run(seed=0)
    batches = private.batches()
    first = next(batches)
    state = private.state_dict()
    _take_step(private, model, first)
    private.load_state_dict(state)
    assert next(batches) == first


MECHANISMS = {
    "truncated": {"sampler": "truncated_poisson", "largest_batch": 4},
    "bins": {"sampler": "balls_in_bins"},
    "regenerated": {"sampler": "cyclic", "noise": "regenerated", "bands": 3},
    "banded": {"sampler": "cyclic", "noise": "banded", "bands": 3},
    "cyclic Poisson": {"sampler": "cyclic_poisson", "noise": "banded", "bands": 2},
}


def _other_run(kind, *, seed, steps=0, state=None, ahead=0):
    """(private, model) of a run with another mechanism, after loading `state` and taking `steps` SGD steps."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    mechanism = Mechanism(12, 3, 1.0, 1.0, delta=1e-3, **MECHANISMS[kind])
    private = PrivateGradients(model, mechanism, seed=seed)
    if state is not None:
        private.load_state_dict(state["private"])
        model.load_state_dict(state["model"])
    batches, waiting = private.batches(), []
    for _ in range(steps):
        while len(waiting) <= ahead:
            waiting.append(next(batches))
        indices = waiting.pop(0)
        if indices:
            inputs = torch.linspace(-1, 1, 36, dtype=torch.float64).view(12, 3)[indices]
            private.backward(model(inputs).square().sum(1))
        private.finish()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        model.zero_grad()
    return private, model


@pytest.mark.parametrize("kind", MECHANISMS)
@pytest.mark.parametrize(("before", "ahead"), [(1, 0), (3, 2), (5, 1)])
def test_every_mechanism_continues_bit_for_bit(kind, before, ahead):
    _, whole = _other_run(kind, seed=4, steps=8, ahead=ahead)
    private, model = _other_run(kind, seed=4, steps=before, ahead=ahead)
    state = {"private": private.state_dict(), "model": model.state_dict()}
    continued, again = _other_run(kind, seed=9, steps=8 - before, state=state)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert continued.steps == 8


@pytest.mark.parametrize("kind", ["regenerated", "banded"])
def test_a_rehearsal_leaves_correlated_noise_as_it_was(kind):
    def weights(rehearsed):
        private, model = _other_run(kind, seed=4, steps=2)
        if rehearsed:
            with private.rehearsal():
                private.backward(model(torch.ones(2, 3, dtype=torch.float64)).square().sum(1))
                private.finish()
        state = {"private": private.state_dict(), "model": model.state_dict()}
        return _other_run(kind, seed=4, steps=2, state=state)[1].weight

    assert torch.equal(weights(False), weights(True))


def test_a_checkpoint_with_other_generators_is_refused():
    private, _ = _linear_run(seed=0)
    old = {**private.state_dict(), "noise": torch.zeros(5056, dtype=torch.uint8)}
    del old["noise_past"]
    with pytest.raises(PrivacyError, match="made by a version of memsave with other random generators"):
        private.load_state_dict(old)
