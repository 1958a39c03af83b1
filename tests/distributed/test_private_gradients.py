"""PrivateGradients in several processes: the parameters after some steps are those of one process."""

import math
from functools import cache
from itertools import chain

import pytest
import torch
from torch import nn

from memsave.ghost import GhostClipper
from memsave.privacy import Mechanism, PrivacyError, PrivateGradients
from memsave.privacy.audit import CanaryAudit
from memsave.privacy.randomness import SecretStream
from memsave.privacy.sampling import Sampler
from memsave.processes import process_count, process_rank, share
from memsave.training.sharding import full_tensors, shard_model
from tests.support.distributed_models import EXAMPLES, MODELS, draw, losses_of, make_model
from tests.support.processes import run_processes

STEPS = 2
FEW = ("mlp", "gpt2", "unet_reversible")


CORRELATED = {
    "banded": {"noise": "banded", "bands": 3, "sampler": "cyclic"},
    "regenerated": {"noise": "regenerated", "bands": 3, "sampler": "cyclic"},
}


def private_of(model, *, batch_size=4, noise=0.0, norm=2.5, seed=1, kind="independent", **options):
    mechanism = Mechanism(EXAMPLES, batch_size, noise, norm, delta=1e-3, **CORRELATED.get(kind, {}))
    return PrivateGradients(model, mechanism, seed=seed, **options)


def take_steps(name, model, private, optimizer, steps=STEPS):
    """Each step in micro-batches of two examples; returns the batches (of this process)."""
    batches = []
    for _, rows in zip(range(steps), private.batches()):
        batches.append(rows)
        for micro in private.micro_batches(rows, 2):
            private.backward(losses_of(name, model, micro))
        private.finish()
        optimizer.step()
        optimizer.zero_grad()
    return batches


@cache
def trained(name, *, sharded, batch_size=4, noise=0.0):
    """(parameters after the steps, counts, batches) of a private run."""
    model = make_model(name)
    if sharded:
        shard_model(model, torch.device("cpu"))
    private = private_of(model, batch_size=batch_size, noise=noise)
    batches = take_steps(name, model, private, torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False))
    private.close()
    whole = full_tensors(dict(model.named_parameters()), keep=True)
    weights = torch.cat([each.flatten() for each in whole.values()])
    return weights, (private.steps, private.examples, private.clipped, private.nonfinite), batches


def trained_all(models=FEW):
    """What `trained` returns, by (sharded, name); `models` are those that are sharded."""
    found = {}
    for sharded in (False, True):
        shards = sharded and process_count() > 1
        found |= {(sharded, name): trained(name, sharded=shards) for name in (models if sharded else FEW)}
        one = trained("mlp", sharded=shards, batch_size=1)  # fewer than processes; some batches are empty
        found[sharded, "one example a batch"] = one
    found[False, "noise"] = trained("mlp", sharded=False, noise=1.0)
    return found


@pytest.mark.parametrize(
    ("count", "models"),
    [(2, FEW), pytest.param(2, MODELS, marks=pytest.mark.slow), pytest.param(3, FEW, marks=pytest.mark.slow)],
)
def test_the_parameters_are_those_of_one_process(count, models):
    alone, ranks = trained_all(models), run_processes(count, trained_all, models)
    for key in ranks[0]:
        weights, counts, batches = alone[key]
        for rank in ranks:
            torch.testing.assert_close(rank[key][0], weights, rtol=0, atol=1e-10)
            assert torch.equal(rank[key][0], ranks[0][key][0])  # not only close: the processes must not drift apart
            assert rank[key][1] == counts
        shares = [rank[key][2] for rank in ranks]
        assert [sorted(chain(*step)) for step in zip(*shares)] == batches
    assert any(not rows for rank in ranks for rows in rank[True, "one example a batch"][2])
    _, examples, clipped, _ = alone[True, "gpt2"][1]
    assert 0 < clipped < examples


def noise_of(sharded, steps=50):
    """(the variance of the noise over all steps, the last noise) of a gradient that is zero."""
    model = nn.Linear(10, 10, bias=False, dtype=torch.float64)
    if sharded:
        shard_model(model, torch.device("cpu"))
    private = PrivateGradients(model, Mechanism(EXAMPLES, 1, 2.0, 0.5, delta=1e-3))  # noise: 1.0 in all
    total = 0.0
    for _, rows in zip(range(steps), private.batches()):
        for micro in private.micro_batches(rows):
            private.backward(model(draw(len(micro), 10)).sum(1) * 0)
        private.finish()
        last = full_tensors({"": model.weight.grad}, keep=True)[""].clone()
        total += float(last.square().sum())
        model.zero_grad()
    return total / (steps * last.numel()), last


@pytest.mark.parametrize("sharded", [False, True])
def test_there_is_noise_once(sharded):
    """Noise in each of two processes would have twice the variance; shards with one stream would have equal noise."""
    ranks = run_processes(2, noise_of, sharded)
    assert torch.equal(ranks[0][1], ranks[1][1])
    assert len(ranks[0][1].unique()) == ranks[0][1].numel()
    assert ranks[0][0] == pytest.approx(1.0, abs=5 * math.sqrt(2 / 5_000))


def sharded_with_correlated_noise():
    """The error of correlated noise on a sharded model."""
    model = make_model("mlp")
    shard_model(model, torch.device("cpu"))
    try:
        private_of(model, kind="banded")
    except PrivacyError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_correlated_noise_is_refused_for_sharded_models():
    for said in run_processes(2, sharded_with_correlated_noise):
        assert said.startswith("noise=banded needs whole gradients, and FSDP shards them")


def continued(state=None, kind="independent"):
    """Two steps with noise and secret generators, after loading a state; the state after them, then a third step."""
    model = make_model("mlp")
    private = private_of(model, noise=1.0, seed=None, kind=kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if state is not None:
        model.load_state_dict(state["model"])
        private.load_state_dict(state["private"])
    else:
        take_steps("mlp", model, private, optimizer, steps=2)
    saved = {
        "model": {key: value.clone() for key, value in model.state_dict().items()},
        "private": private.state_dict(),
    }
    batches = take_steps("mlp", model, private, optimizer, steps=1)
    return saved, torch.cat([p.detach().flatten() for p in model.parameters()]), batches


def drawn(ranks):
    """The examples that the last step of all ranks took."""
    return sorted(chain(*(batch for rank in ranks for batch in rank[2])))


@pytest.mark.parametrize("kind", ["independent", *(pytest.param(each, marks=pytest.mark.slow) for each in CORRELATED)])
def test_a_run_resumes_with_any_number_of_processes(kind):
    first = run_processes(2, continued, None, kind)
    state = first[0][0]
    assert all(torch.equal(state["private"]["noise"], rank[0]["private"]["noise"]) for rank in first)
    assert len(set(map(bytes, state["private"]["noise"].numpy()))) == 2  # each process has a stream of its own
    for count in (2, 3):
        again = run_processes(count, continued, state, kind)
        assert drawn(again) == drawn(first)
        for rank in again:
            torch.testing.assert_close(rank[1], first[0][1], rtol=0, atol=1e-12)
    alone = continued(state, kind)
    torch.testing.assert_close(alone[1], first[0][1], rtol=0, atol=1e-12)


def refusals():
    found = {}

    def note(name, function):
        try:
            function()
        except ValueError as error:
            found[name] = str(error)

    model = make_model("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    clipper.backward(losses_of("mlp", model, share(range(EXAMPLES))))
    note("step before the sum", optimizer.step)
    clipper.sum_gradients()
    optimizer.step()
    clipper.close()
    optimizer.zero_grad()
    private = private_of(model, batch_size=EXAMPLES)
    batches = private.batches()
    rows = next(batches)
    if process_rank() == 1:
        private._sampler.set_state(Sampler(private.mechanism, SecretStream(3)).get_state())
    private.backward(losses_of("mlp", model, rows))
    private.finish()
    optimizer.zero_grad()
    private.mechanism = private._sampler.mechanism = Mechanism(EXAMPLES, 4, 0.0, 2.5, delta=1e-3)
    rows = next(private.batches())
    for row in rows:
        private.backward(losses_of("mlp", model, [row]))
    note("other batches", private.finish)
    private.close()
    optimizer.zero_grad()
    return found


def test_processes_that_disagree_are_refused():
    for found in run_processes(2, refusals):
        assert "call clipper.sum_gradients()" in found["step before the sum"]
        assert (
            issubclass(PrivacyError, ValueError) and "not at the same step or drew different" in found["other batches"]
        )


def audited(steps=3):
    """(what was included, the scores, the numbers of draws) of an audit, and the parameters after the steps."""
    model = nn.Sequential(nn.Linear(10, 30), nn.Linear(30, 2)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    audit = CanaryAudit(examples=EXAMPLES, gradient=20)
    private = PrivateGradients(model, Mechanism(audit.size, audit.size, 1.0, 0.5, delta=1e-3), audit=audit)
    for _, rows in zip(range(steps), private.batches()):
        private.backward(model(draw(len(rows), 10)).sum(1) * 0)
        private.finish()
        model.zero_grad()
    private.close()
    return audit.included, audit.evidence, audit.draws


def test_an_audit_has_the_same_canaries_and_scores_in_all_processes():
    first, other = run_processes(2, audited)
    assert all(torch.equal(one, two) for one, two in zip(first, other))
    included, evidence, draws = first
    assert (draws == 3).all()
    # normal with mean 3/2 or -3/2 and variance 3: a canary that both processes add has 9/2
    means = [evidence[which].mean().item() for which in (included, ~included)]
    assert abs(means[0] - 1.5) < 2.4
    assert abs(means[1] + 1.5) < 2.4
