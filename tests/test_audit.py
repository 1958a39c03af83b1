"""`python -m memsave.audit`: exit codes and sentences; the trainings are few."""

import re
from dataclasses import replace

import numpy as np
import pytest

from memsave import audit
from memsave.privacy import Mechanism
from memsave.privacy.audit import error_rates
from memsave.privacy.audit.trials import Trials, run_trials
from memsave.privacy.noise import GaussianNoise

pytest.importorskip("opacus")
pytest.importorskip("dp_accounting")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs=3"], "runs is 3: give a whole number from 100 on"),
        (["runs=many"], "runs is 'many': give a whole number"),
        (["epsilon=0"], "epsilon is 0.0: give a number above 0"),
        (["sample_rate=2"], "sample_rate is 2.0: give a number above 0 and at most 1"),
        (["clipping=layers"], "clipping is 'layers': give one of flat, automatic, per_layer"),
        (["run=100"], "run is not known: .*did you mean runs"),
        (["fast"], "'fast' cannot be read"),
    ],
)
def test_bad_input_ends_with_one_sentence_and_exit_code_2(arguments, message, capsys):
    assert audit.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("memsave: ")
    assert re.search(message, line)


def test_help_is_the_text_of_the_module(capsys):
    assert audit.main(["--help"]) == 0
    assert capsys.readouterr().out.strip() == audit.__doc__.strip()


@pytest.mark.slow
def test_an_honest_implementation_is_not_refuted(capsys):
    assert audit.main(["runs=100", "steps=1"]) == 0
    out = capsys.readouterr().out
    assert "promised: epsilon = 7.99 at delta = 1e-05" in out
    assert "clipping: exact" in out
    assert "the promise is not refuted; a lower bound is no proof of privacy" in out


@pytest.mark.parametrize(("distance", "code"), [(1.5, 0), (6.0, 1)])
def test_scores_that_are_too_far_apart_refute_the_promise(distance, code, monkeypatch, capsys):
    chance = np.random.default_rng(0)

    def found(problem, mechanism, **options):
        return Trials(mechanism, options["steps"], distance + chance.standard_normal(500), chance.standard_normal(500))

    monkeypatch.setattr(audit, "run_trials", found)
    assert audit.main(["runs=1000"]) == code
    out = capsys.readouterr().out
    assert "1000 trainings, 500 with the record; 800 are counted" in out
    assert ("the promise is not refuted" in out) == (code == 0)


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_the_bounds_of_trials_are_those_of_their_error_rates(sigma):
    mechanism = Mechanism(10, 10, sigma, 1.0, delta=1e-5, accountant="rdp")
    chance = np.random.default_rng(0)
    trials = Trials(mechanism, 1, 2 + chance.standard_normal(200), chance.standard_normal(200))
    found = trials.bounds(confidence=0.9)
    rates = error_rates(trials.present, trials.absent, delta=1e-5, significance=0.1)
    assert found["error rates"] == pytest.approx(rates.epsilon(1e-5)) and found["error rates"] > 0
    assert (found["Gaussian"] == found["error rates"]) == (sigma == 0)


def test_a_step_without_noise_is_refuted_by_its_check(monkeypatch, capsys):
    monkeypatch.setattr(GaussianNoise, "add_", lambda self, *, std: None)
    assert audit.main(["runs=100", "steps=1"]) == 1
    assert "the promise is refuted: embedding.weight" in capsys.readouterr().out


def test_clipping_that_is_not_exact_is_refuted_before_any_training(monkeypatch, capsys):
    from memsave.ghost import ledger

    monkeypatch.setattr(ledger, "inner_products", lambda one, other, **options: 0.0 * ledger.magnitude(one))
    assert audit.main(["runs=100", "steps=1"]) == 1
    assert "the promise is refuted: clipping is not exact" in capsys.readouterr().out


@pytest.mark.slow
def test_a_canary_moves_the_scores_by_what_the_mechanism_allows():
    """At sample rate 1 the scores are normal, with mean plus or minus mu^2 / 2, mu = sqrt(steps) / sigma."""
    options = audit.Options(runs=100, steps=2)
    mechanism = audit.make_mechanism(options)
    trials = run_trials(audit.small_problem(), mechanism, runs=120, steps=2)
    mu = 2**0.5 / mechanism.noise_multiplier
    assert len(trials.present) + len(trials.absent) == 120
    for scores, mean in ((trials.present, mu**2 / 2), (trials.absent, -(mu**2) / 2)):
        assert np.mean(scores) == pytest.approx(mean, abs=5 * mu / len(scores) ** 0.5)
        assert np.std(scores) == pytest.approx(mu, rel=0.4)


def test_the_scores_of_almost_no_noise_tell_with_and_without_the_canary_apart():
    mechanism = replace(audit.make_mechanism(audit.Options(runs=100, steps=2)), noise_multiplier=0.05)
    trials = run_trials(audit.small_problem(), mechanism, runs=3, steps=2)
    assert len(trials.present) + len(trials.absent) == 3
    assert (trials.present > 100).all() and (trials.absent < -100).all()


@pytest.mark.slow
def test_a_clipping_norm_that_is_twice_too_large_is_refuted(monkeypatch, capsys):
    from memsave.privacy import gradients

    clipper = gradients.GhostClipper
    monkeypatch.setattr(
        gradients,
        "GhostClipper",
        lambda model, *, max_grad_norm, **rest: clipper(model, max_grad_norm=2 * max_grad_norm, **rest),
    )
    assert audit.main(["runs=400"]) == 1
    assert "the promise is refuted" in capsys.readouterr().out
