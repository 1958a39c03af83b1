"""Canaries: their directions, what is added and scored, indices, state, refusals, and the report of a run."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from memsave.privacy import Mechanism, PrivacyError, PrivateGradients
from memsave.privacy.audit import CanaryAudit, audit_report, canaries
from memsave.privacy.audit.canaries import _directions
from memsave.privacy.audit.report import AuditReport, CanaryGroup, epsilon_of_refuted_noise
from memsave.privacy.audit.sampling_check import _dispersion, sampling_findings
from memsave.privacy.audit.trade_off import gaussian_trade_off

pytest.importorskip("opacus")
PAGE = Path(__file__).parents[3] / "docs" / "audit.md"


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 300), nn.Tanh(), nn.Linear(300, 20))


X = torch.randn(16, 10, generator=torch.Generator().manual_seed(0))


def private_of(audit, *, batch=None, sigma=1.0):
    mechanism = Mechanism(audit.size, batch or audit.size, sigma, 0.5, delta=1e-3, accountant="rdp")
    return PrivateGradients(model_of(), mechanism, audit=audit)


def take_steps(private, count):
    for _, indices in zip(range(count), private.batches(), strict=False):
        private.model.zero_grad()
        if indices:
            private.backward(private.model(X[[each % len(X) for each in indices]]).square().mean(1))
        private.finish()


def directions(model, count):
    """(count, parameters): the directions of the canaries."""
    parameters = list(model.parameters())
    rows = torch.zeros(count, sum(p.numel() for p in parameters), dtype=torch.float64)
    start = 0
    entries = {id(p): rest for p, *rest in _directions(parameters, count=count)}
    for p in parameters:
        places, canaries, signs = entries[id(p)]
        rows[canaries, start + places] = signs
        start += p.numel()
    return rows


def test_directions_have_norm_1_and_no_common_element():
    rows = directions(model_of(), 50)
    torch.testing.assert_close(rows @ rows.T, torch.eye(50, dtype=torch.float64))


@pytest.mark.parametrize("batch", [28, 56])
def test_a_step_scores_each_canary_by_its_likelihood_ratio(batch):
    audit, sigma = CanaryAudit(examples=16, gradient=40), 0.7
    private = private_of(audit, batch=batch, sigma=sigma)
    take_steps(private, 1)
    noisy = torch.cat([p.grad.flatten() for p in private.model.parameters()]).double() * batch
    x, q = directions(private.model, 40) @ noisy / 0.5, batch / 56  # C is 0.5
    expected = (1 - q + q * ((2 * x - 1) / (2 * sigma**2)).exp()).log()
    torch.testing.assert_close(audit.evidence, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("most", "elements"), [(2**20, 64), (400, 8), (10, 1)])
def test_the_elements_of_all_directions_together_are_limited(monkeypatch, most, elements):
    monkeypatch.setattr(canaries, "MOST_ELEMENTS", most)
    found = _directions(list(model_of().parameters()), count=50)
    assert sum(len(places) for _, places, _, _ in found) == 50 * elements


def test_without_noise_an_included_canary_adds_C_along_its_direction_in_each_step_that_draws_it():
    audit = CanaryAudit(examples=16, gradient=40)
    take_steps(private_of(audit, batch=28, sigma=0.0), 6)
    assert all(0 < size < 56 for size in audit.batch_sizes)
    drawn = audit.draws[16:]
    present = torch.where(audit.included, drawn, 0).double()
    assert 0 < present.sum() < 6 * 40
    assert (audit.evidence - present).abs().max() < 0.8 * 6  # what the examples add
    assert torch.corrcoef(torch.stack([audit.evidence, present]))[0, 1] > 0.9


def test_excluded_canaries_and_those_in_gradient_space_never_reach_the_model():
    audit = CanaryAudit(examples=16, gradient=10, inputs=10, seed=0)
    assert audit.size == 36
    kept = audit.without_canaries(list(range(36)))
    assert kept == [*range(16), *(16 + int(each) for each in audit.included[:10].nonzero())]
    assert 16 < len(kept) < 26


def test_inclusion_is_drawn_from_the_operating_system_unless_it_has_a_seed():
    first, second = (CanaryAudit(examples=1, gradient=200) for _ in range(2))
    assert not torch.equal(first.included, second.included)
    assert 60 < int(first.included.sum()) < 140
    seeded = [CanaryAudit(examples=1, gradient=200, seed=3).included for _ in range(2)]
    assert torch.equal(*seeded)


def test_the_mechanism_counts_the_canaries():
    audit = CanaryAudit(examples=16, gradient=10)
    with pytest.raises(PrivacyError, match="has 16 examples, but the audit samples 26"):
        PrivateGradients(model_of(), Mechanism(16, 4, 1.0, 0.5, delta=1e-3), audit=audit)


def test_more_canaries_than_parameters_are_refused():
    audit = CanaryAudit(examples=16, gradient=100)
    with pytest.raises(PrivacyError, match=r"100 gradient-space canaries .* the model has 12; give fewer"):
        PrivateGradients(nn.Linear(3, 3), Mechanism(116, 4, 1.0, 0.5, delta=1e-3), audit=audit)


def test_a_resumed_audit_has_the_canaries_and_scores_of_the_checkpoint():
    private = private_of(CanaryAudit(examples=16, gradient=30))
    take_steps(private, 3)
    state, other = private.state_dict(), private_of(CanaryAudit(examples=16, gradient=30))
    other.load_state_dict(state)
    assert torch.equal(other.audit.included, private.audit.included)
    assert torch.equal(other.audit.evidence, private.audit.evidence)
    assert other.audit.batch_sizes == private.audit.batch_sizes == [46, 46, 46]
    take_steps(other, 1)
    assert not torch.equal(other.audit.evidence, private.audit.evidence)


def test_a_checkpoint_without_these_canaries_is_refused():
    plain = PrivateGradients(model_of(), Mechanism(46, 46, 1.0, 0.5, delta=1e-3, accountant="rdp"))
    other = private_of(CanaryAudit(examples=26, gradient=20))
    for state in (plain.state_dict(), other.state_dict()):
        with pytest.raises(PrivacyError, match="without these canaries"):
            private_of(CanaryAudit(examples=16, gradient=30)).load_state_dict(state)
    plain.close()


def test_a_rehearsal_scores_nothing():
    private = private_of(CanaryAudit(examples=16, gradient=30))
    with private.rehearsal():
        private.backward(private.model(X).square().mean(1))
        private.finish()
    assert not private.audit.evidence.any()
    assert private.audit.batch_sizes == []


def test_an_honest_run_is_not_refuted_and_a_run_without_noise_is(monkeypatch):
    from memsave.privacy import noise_check
    from memsave.privacy.noise import GaussianNoise

    private = private_of(CanaryAudit(examples=16, gradient=400))
    take_steps(private, 2)
    report = audit_report(private)
    assert 0 <= report.epsilon < report.promised
    assert not report.breach
    monkeypatch.setattr(GaussianNoise, "add_", lambda self, *, std: None)
    monkeypatch.setattr(noise_check.NoiseCheck, "after", lambda self, std: None)
    private = private_of(CanaryAudit(examples=16, gradient=400))
    take_steps(private, 2)
    report = audit_report(private)
    assert report.promised < report.epsilon <= report.most
    assert report.breach
    assert "the promise is refuted" in str(report)


def test_the_example_of_the_page_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 400), nn.Tanh(), nn.Linear(400, 1))
    exec(code, {"model": nn.Sequential(model, nn.Identity()), "x": X, "y": torch.zeros(16)})
    assert "the promise is not refuted" in capsys.readouterr().out


def poisson(size, rate, steps):
    drawn = torch.rand(steps, size, generator=torch.Generator().manual_seed(0)) < rate
    return drawn.sum(0), drawn.sum(1).tolist()


def test_poisson_samples_pass_the_test_of_the_sampler():
    for size, rate, steps in ((500, 0.1, 40), (50, 0.5, 400), (2000, 0.002, 30), (20, 0.05, 3)):
        draws, sizes = poisson(size, rate, steps)
        assert sampling_findings(draws, sizes, sample_rate=rate) == []
    assert sampling_findings(torch.full((5,), 3), [5, 5, 5], sample_rate=1.0) == []


def test_shuffled_batches_and_another_rate_are_found():
    equal = sampling_findings(torch.full((500,), 4), [50] * 40, sample_rate=0.1)
    assert len(equal) == 2
    assert "0 times that of Poisson" in equal[0]
    draws, sizes = poisson(500, 0.12, 40)
    assert "1.2" in sampling_findings(draws, sizes, sample_rate=0.1)[0]
    assert sampling_findings(torch.tensor([3, 2]), [2, 2, 1], sample_rate=1.0)


def test_the_dispersion_is_standardised_by_the_kurtosis_of_the_binomial():
    """The mean square of k counts has the variance (excess kurtosis + 2) / k, and 2 / k' for chi^2 of k' over k'."""
    from scipy.stats import binom

    excess = float(binom.stats(20, 0.2, moments="k"))
    ninth = (excess + 2) / 4 / 9
    found, score = _dispersion([3, 5, 4, 8], trials=20, q=0.2)
    assert found == pytest.approx((1 + 1 + 0 + 16) / 4 / 3.2)
    assert score == pytest.approx((found ** (1 / 3) - (1 - ninth)) / ninth**0.5)


def test_a_bound_that_equals_the_promise_does_not_refute_it():
    group = CanaryGroup("gradient", 10, 5, {"one_run": 1.0}, {"one_run": 2.0}, [], [])
    assert not AuditReport(1.0, 1e-5, 0.95, 1, [group]).breach
    assert AuditReport(0.99, 1e-5, 0.95, 1, [group]).breach


@pytest.mark.parametrize("least", [0.3, 0.83, 2.3, 3.1])
def test_the_epsilon_of_refuted_noise_is_that_of_the_least_refuted_noise_on_a_grid(least):
    mechanism = Mechanism(10, 10, 1.0, 0.5, delta=1e-5, accountant="rdp")
    limit = gaussian_trade_off(1 / least)(0.3)
    found = epsilon_of_refuted_noise(lambda f: f(0.3) > limit, mechanism, steps=1)
    bounds = [replace(mechanism, noise_multiplier=each).epsilon(1) for each in (least * 2 ** (1 / 24), least)]
    assert bounds[0] <= found <= bounds[1]
