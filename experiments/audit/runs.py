"""One private run with a breach, and what finds it."""

import itertools
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.audit.breaches import Breach, mixed_losses, next_word_losses
from memsave.audit import Options, make_mechanism, small_problem
from memsave.ghost import verify
from memsave.privacy import Mechanism, PrivateGradients
from memsave.privacy.audit import CanaryAudit, audit_report
from memsave.privacy.audit.trials import run_trials

WORDS, WIDTH, LENGTH, RECORDS = 40, 48, 8, 120
STEPS = 48
CHECKS = {
    "noise_check": "noise check of every step",
    "guard": "order of calls (Guard)",
    "gradients": "PrivateGradients",
    "clipper": "clipper",
    "independence": "independence check",
}
"""What raises, by the name of its module."""


@dataclass(frozen=True)
class Finding:
    """What found a breach, and its sentence."""

    by: str
    sentence: str


class TiedModel(nn.Module):
    """Predicts the next word; the embedding is also the weight of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        nn.init.normal_(self.embedding.weight, std=WIDTH**-0.5)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        """(B, T) words to (B, T, W) logits."""
        embedded = self.embedding(words)
        logits: Tensor = self.head(embedded + torch.tanh(self.middle(embedded)))
        return logits


def find(breach: Breach) -> Finding | None:
    """What a run with the breach says first: verify before it, a check in a step, or the audit at its end."""
    words = torch.randint(WORDS, (RECORDS, LENGTH))
    losses = next_word_losses if breach.losses == "own" else mixed_losses
    with breach.planted():
        clipping = verify(TiedModel(), words[:8], losses)
        if not clipping.ok:
            return Finding("verify", clipping.findings[0])
        audit = CanaryAudit(examples=RECORDS, gradient=60)
        mechanism = Mechanism(audit.size, 45, 1.0, 0.5, delta=1e-4, accountant="rdp")
        private = PrivateGradients(TiedModel(), mechanism, audit=audit)
        try:
            _steps(private, words, losses, breach, count=STEPS // 2)
            if breach.resumed:
                state = private.state_dict()
                private.close()
                private = PrivateGradients(TiedModel(), mechanism, audit=CanaryAudit(examples=RECORDS, gradient=60))
                private.load_state_dict(state)
            _steps(private, words, losses, breach, count=STEPS // 2)
        except ValueError as error:
            module = Path(traceback.extract_tb(error.__traceback__)[-1].filename).stem
            return Finding(CHECKS.get(module, module), str(error))
        finally:
            private.close()
        report = audit_report(private)
    if report.findings:
        return Finding("audit: test of the sampler", report.findings[0])
    return Finding("audit: bound", str(report).splitlines()[0]) if report.breach else None


def _steps(private: PrivateGradients, words: Tensor, losses, breach: Breach, *, count: int) -> None:
    optimizer = torch.optim.SGD(private.model.parameters(), 0.1)
    own = itertools.cycle(torch.randperm(RECORDS).split(20))
    for indices in itertools.islice(private.batches() if breach.batches == "own" else own, count):
        if len(indices):
            private.backward(losses(private.model, words[indices]))
        private.finish()
        optimizer.step()
        optimizer.zero_grad()


def one_run(breach: Breach, *, canaries: int) -> dict[str, float]:
    """{promised, bound, most} of one run with gradient-space canaries in a model of 120,000 parameters."""
    with breach.planted(), breach.off():
        model = nn.Sequential(nn.Linear(20, 1000), nn.Tanh(), nn.Linear(1000, 100))
        audit, x = CanaryAudit(examples=64, gradient=canaries), torch.randn(64, 20)
        mechanism = Mechanism(audit.size, audit.size, 2.0, 0.5, delta=1e-5, accountant="pld")
        private = PrivateGradients(model, mechanism, audit=audit)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for indices in itertools.islice(private.batches(), 4):
            private.backward(model(x[indices]).square().mean(1))
            private.finish()
            optimizer.step()
            optimizer.zero_grad()
        private.close()
        report = audit_report(private)
    return {"promised": report.promised, "bound": report.epsilon, "most": report.most}


def trials(breach: Breach, *, runs: int) -> dict[str, float]:
    """{promised, bound, most} of many trainings with and without one record, as `python -m memsave.audit` does."""
    options = Options(runs=runs)
    mechanism, problem = make_mechanism(options), small_problem()
    with breach.planted(), breach.off():
        found = run_trials(problem, mechanism, runs=runs, steps=options.steps)
    bounds, most = found.bounds(confidence=0.95), found.most(confidence=0.95)
    return {"promised": mechanism.epsilon(options.steps), "bound": max(bounds.values()), "most": max(most.values())}
