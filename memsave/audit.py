"""Audits private training by many small trainings, with and without one record.

    python -m memsave.audit
    python -m memsave.audit runs=4000 epsilon=4 steps=3
    python -m memsave.audit sample_rate=0.5 steps=6 clipping=per_layer

Each training takes a language model with a few hundred parameters, whose embedding is tied to its head, through
memsave's own sampling, clipping and noise. An adversary sees every noisy gradient and decides whether one record was
there. Its error rates bound epsilon from below; a bound above the promised epsilon refutes the promise.

Keys: runs= trainings (default 1000), epsilon= promised, from which the noise is computed (default 8), delta= (default
1e-5), steps= of each training (default 2), sample_rate= of the records (default 1, at which most can be seen),
clipping= flat, automatic or per_layer, confidence= (default 0.95). Exit codes: 0 if the promise is not refuted, 1 if it
is, 2 for bad input.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memsave.arguments import ArgumentError, parse_arguments
from memsave.ghost import verify
from memsave.ghost.clipper import CLIPPINGS
from memsave.privacy import Mechanism, PrivacyError, noise_multiplier_for
from memsave.privacy.audit.trials import Problem, Trials, counted_runs, run_trials

RECORDS, LENGTH, WORDS, WIDTH = 8, 6, 12, 8
MAX_GRAD_NORM = 0.5
LEAST_RUNS = 100


def _number(default: float, expects: str) -> float:
    return field(default=default, metadata={"expects": expects})


@dataclass
class Options:
    """The keys of the command line."""

    runs: int = field(default=1000, metadata={"expects": f"a whole number from {LEAST_RUNS} on, as in runs=4000"})
    epsilon: float = _number(8.0, "a number above 0, as in epsilon=8")
    delta: float = _number(1e-5, "a number above 0 and below 0.1, as in delta=1e-5")
    steps: int = field(default=2, metadata={"expects": "a whole number above 0, as in steps=2"})
    sample_rate: float = _number(1.0, "a number above 0 and at most 1, as in sample_rate=0.5")
    clipping: str = "flat"
    confidence: float = _number(0.95, "a number from 0.5 to 0.9999, as in confidence=0.95")

    def check(self) -> None:
        """Raise ArgumentError for a value out of range."""
        valid = {
            "runs": self.runs >= LEAST_RUNS,
            "epsilon": 0 < self.epsilon < math.inf,
            "delta": 0 < self.delta < 1 / (RECORDS + 1),
            "steps": self.steps >= 1,
            "sample_rate": 0 < self.sample_rate <= 1,
            "confidence": 0.5 <= self.confidence <= 0.9999,
        }
        for key, is_valid in valid.items():
            if not is_valid:
                expects = type(self).__dataclass_fields__[key].metadata["expects"]
                raise ArgumentError(f"{key} is {getattr(self, key)}: give {expects}")
        if self.clipping not in CLIPPINGS:
            raise ArgumentError(f"clipping is {self.clipping!r}: give one of {', '.join(CLIPPINGS)}")


class TiedModel(nn.Module):
    """Predicts the next word; the embedding is also the weight of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        """(B, T) words to (B, T, W) logits."""
        logits: Tensor = self.head(torch.tanh(self.middle(self.embedding(words))))
        return logits


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(given):
        print(__doc__)
        return 0
    try:
        options = parse_arguments(given, Options, example="runs=4000")
        options.check()
        mechanism = make_mechanism(options)
    except (ArgumentError, PrivacyError) as error:
        print(f"memsave: {error}", file=sys.stderr)
        return 2
    problem = small_problem()
    clipping = verify(problem.make_model(), problem.records, problem.losses, clipping=options.clipping)
    print(
        f"promised: epsilon = {mechanism.epsilon(options.steps):.2f} at delta = {mechanism.delta:g}, by noise "
        f"multiplier {mechanism.noise_multiplier:.3f} in {options.steps} steps at sample rate "
        f"{mechanism.sample_rate:.3g}\nclipping: {clipping}"
    )
    if not clipping.ok:
        print("the promise is refuted: clipping is not exact")
        return 1
    try:
        trials = run_trials(problem, mechanism, runs=options.runs, steps=options.steps, clipping=options.clipping)
    except PrivacyError as error:
        print(f"the promise is refuted: {error}")
        return 1
    return _print_result(trials, options)


def make_mechanism(options: Options) -> Mechanism:
    """The mechanism whose noise keeps the trainings within the promised epsilon."""
    size = RECORDS + 1
    batch_size = max(1, round(options.sample_rate * size))
    noise = noise_multiplier_for(
        target_epsilon=options.epsilon,
        sample_rate=batch_size / size,
        steps=options.steps,
        delta=options.delta,
        accountant="pld",
    )
    return Mechanism(size, batch_size, noise, MAX_GRAD_NORM, options.delta, accountant="pld")


def small_problem() -> Problem:
    """Sentences of random words; the last one, the canary, has words that the others do not have."""
    generator = torch.Generator().manual_seed(0)
    records = torch.randint(WORDS // 2, (RECORDS + 1, LENGTH), generator=generator)
    records[-1] += WORDS // 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start = TiedModel().state_dict()

    def make_model() -> nn.Module:
        model = TiedModel()
        model.load_state_dict(start)
        return model

    return Problem(make_model, records, next_word_losses)


def next_word_losses(model: nn.Module, words: Tensor) -> Tensor:
    """(B,): the mean cross-entropy of the next words of each sentence."""
    logits = model(words[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), words[:, 1:], reduction="none").mean(1)


def _print_result(trials: Trials, options: Options) -> int:
    promised = trials.mechanism.epsilon(options.steps)
    bounds, most = (each(confidence=options.confidence) for each in (trials.bounds, trials.most))
    print(
        f"{options.runs} trainings, {len(trials.present)} with the record; {counted_runs(options.runs)} are counted, "
        f"the others choose the thresholds"
    )
    print(f"lower bounds of epsilon with {options.confidence:.0%} confidence:")
    for name, bound in bounds.items():
        print(f"  {name:<12} {bound:6.2f}   (with so many trainings at most {most[name]:.2f})")
    if max(bounds.values()) > promised:
        print("the promise is refuted")
        return 1
    print("the promise is not refuted; a lower bound is no proof of privacy")
    return 0


if __name__ == "__main__":
    sys.exit(main())
