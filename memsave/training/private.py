"""A run's privacy: the mechanism that its config asks for, and the statement of what it spent."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memsave.config import ConfigError
from memsave.config.schema import Config, GhostPrivacy
from memsave.data.loader import Index
from memsave.ghost import verify
from memsave.privacy import Mechanism, PrivateGradients, default_delta, noise_multiplier_for
from memsave.privacy.accounting import PRV_LIMIT
from memsave.profiler import parse_bytes
from memsave.training.checkpoint import noise_multiplier_in
from memsave.training.loop import TrainingError
from memsave.training.progress import Progress
from memsave.training.task import Task

LARGE_DELTA = 1e-3  # above, delta is no negligible probability
VERIFIED = 4  # examples of the first batch that are differentiated one by one
NOT_PRIVATE = (
    "everything but model/ and privacy.md: losses, scores, memory and the share of clipped examples follow the data",
    "checkpoint/ and checkpoint.previous/ above all: they hold the state of the noise generator",
    "samples.md, overlay.png: they show held-out examples as they are",
    "the number of training examples, which privacy.md names: it is taken as public",
)

AHEAD = 1.2  # epsilon grows with the root of the steps: what the log shows is at most about a tenth too high
LARGE_EPSILON = 20.0
PRACTICE = f"""
At an epsilon above {LARGE_EPSILON:g} this protects nobody in practice."""
EARLY = """
**It ended early,** after {steps} of {planned_steps} steps, and epsilon is that of the steps that were taken. If it was
stopped because of a score on private data, such as a validation loss, the choice of the moment tells about these data,
and this statement does not cover it.
"""


def make_private(config: Config, model: nn.Module, task: Task, *, progress: Progress) -> PrivateGradients | None:
    """Clipping, noise and sampling for this run, calibrated; None without privacy."""
    privacy, trainer = config.privacy, config.trainer
    if not isinstance(privacy, GhostPrivacy):
        return None
    size, batch_size = task.size, trainer.batch_size
    delta = default_delta(size) if privacy.target_delta is None else privacy.target_delta
    known: dict[str, Any] = {"delta": delta, "accountant": privacy.accountant}
    # Validate sizes and delta with a dummy mechanism before calibrating.
    Mechanism(size, batch_size, 1.0, privacy.max_grad_norm, **known)
    noise = privacy.noise_multiplier
    if noise is None and trainer.resume:
        noise = noise_multiplier_in(Path(trainer.resume).expanduser())
    if noise is None:
        progress.say(f"looking for the noise of {trainer.steps} steps within epsilon {privacy.target_epsilon:g}")
        noise = noise_multiplier_for(
            target_epsilon=privacy.target_epsilon, sample_rate=batch_size / size, steps=trainer.steps, **known
        )
    mechanism = Mechanism(size, batch_size, noise, privacy.max_grad_norm, **known)
    progress.say(
        f"private: {size} examples, batches of {batch_size} by Poisson sampling, noise multiplier {noise:.3f}, "
        f"C = {privacy.max_grad_norm:g}, delta = {delta:.2e}"
    )
    planned = mechanism.epsilon(trainer.steps)  # fails here, before any step, where it cannot be computed
    if privacy.noise_multiplier is None and planned > privacy.target_epsilon + 1e-6:
        raise ConfigError(
            f"{trainer.steps} steps with the checkpoint's noise multiplier {noise:.4g} would spend epsilon "
            f"{up(planned, '.2f')}, more than privacy.target_epsilon={privacy.target_epsilon:g}; give fewer "
            f"trainer.steps, or privacy.target_epsilon={up(planned, '.2f')}"
        )
    if delta > LARGE_DELTA:
        progress.say(f"warning: {_large_delta(delta, size)}")
    if privacy.seed is not None:
        progress.say(f"privacy.seed is {privacy.seed}: this run is a test and NOT private")
    elif nothing := no_guarantee(noise_multiplier=noise, epsilon=planned):
        progress.say(f"this run is NOT private: {nothing}")
    else:
        progress.say(f"planned: epsilon = {up(planned, '.2f')} after {trainer.steps} steps")
    if privacy.verify and privacy.passes != "direct":
        _verify(model, task, privacy, progress=progress)
    return PrivateGradients(
        model,
        mechanism,
        clipping=privacy.clipping,
        passes=privacy.passes,
        memory_budget=parse_bytes(privacy.memory_budget),
        secure_noise=privacy.secure_noise,
        seed=privacy.seed,
    )


def _large_delta(delta: float, size: int) -> str:
    return (
        f"delta is {delta:.2g} for {size} examples: with up to that probability epsilon limits nothing, so that the "
        f"guarantee is weak whatever epsilon is; give a smaller privacy.target_delta, such as 1e-5"
    )


def _verify(model: nn.Module, task: Task, privacy: GhostPrivacy, *, progress: Progress) -> None:
    """Stop a run whose clipping is not exact on its first examples."""
    progress.say("comparing clipped gradients with one backward per example")
    batch = task.place(task.load([Index(example, example) for example in range(min(VERIFIED, task.size))]))
    tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    options: dict[str, Any] = {"passes": privacy.passes, "clipping": privacy.clipping}
    report = verify(model, tensors, task.per_example_losses, **options)
    if not report.ok:
        raise TrainingError(f"clipping would not be exact: {'; '.join(report.findings)}")


class Spending:
    """Epsilon while a run goes on: an upper bound, that of up to `AHEAD` times the steps that were taken.

    PRV takes a good part of a second, so epsilon is computed when the steps outrun the last bound, and not at each.
    """

    def __init__(self, private: PrivateGradients | None, *, steps: int):
        self.private = None if private is None or private.seeded else private
        self.steps = steps
        self._at, self._epsilon = 0, 0.0

    def entry(self) -> dict[str, float]:
        """`epsilon` for a line of the log; empty where the run promises nothing."""
        if self.private is None:
            return {}
        taken = self.private.steps
        if taken > self._at:
            self._at = max(taken, min(int(AHEAD * taken), self.steps))
            self._epsilon = self.private.mechanism.epsilon(self._at)
        return {"epsilon": self._epsilon} if self._epsilon < math.inf else {}


def no_guarantee(*, noise_multiplier: float, epsilon: float, seeded: bool = False) -> str | None:
    """Why a run promises nothing; None where it promises something."""
    if seeded:
        return "noise and batches came from a fixed seed (privacy.seed)"
    if noise_multiplier == 0:
        return "no noise was added (privacy.noise_multiplier=0)"
    if epsilon == math.inf:
        return f"the noise is too small for any guarantee (noise multiplier {noise_multiplier:g})"
    return None


def spent_by(config: Config, private: PrivateGradients | None, *, unit: str) -> dict[str, Any] | None:
    """What the steps so far have spent, as the entry `privacy` of `result.json`; None without privacy."""
    privacy = config.privacy
    if private is None or not isinstance(privacy, GhostPrivacy):
        return None
    mechanism, epsilon = private.mechanism, private.epsilon
    noise = mechanism.noise_multiplier
    nothing = no_guarantee(noise_multiplier=noise, epsilon=epsilon, seeded=private.seeded)
    return {
        "epsilon": None if nothing else epsilon,
        "no_guarantee": nothing,
        **{key: value for key, value in asdict(mechanism).items() if key != "batch_size"},
        "accountant": "rdp" if mechanism.accountant == "prv" and epsilon > PRV_LIMIT else mechanism.accountant,
        "expected_batch_size": mechanism.batch_size,
        "sample_rate": mechanism.sample_rate,
        "steps": private.steps,
        "planned_steps": config.trainer.steps,
        "unit": unit,
        "adjacency": "add or remove one",
        "sampler": "poisson",
        "clipping": privacy.clipping,
        "clipped_fraction": private.clipped / max(1, private.examples),
        "secure_noise": privacy.secure_noise,
        "seeded": private.seeded,
        "nonfinite_examples": private.nonfinite,
        "not_private": list(NOT_PRIVATE),
    }


def write_statement(spent: dict[str, Any] | None, folder: Path) -> None:
    """Write `privacy.md`: what is guaranteed for what was spent; nothing without privacy."""
    if spent is not None:
        (folder / "privacy.md").write_text(_statement(spent))


def told(spent: dict[str, Any]) -> str:
    """What was spent, in one line."""
    if spent["no_guarantee"]:
        return f"No privacy: {spent['no_guarantee']}"
    hint = "model/ may be released, privacy.md says what may not"
    if spent["epsilon"] > LARGE_EPSILON:
        hint = "an epsilon this large protects nobody in practice"
    return (
        f"Privacy spent: epsilon = {up(spent['epsilon'], '.2f')} at delta = {up(spent['delta'], '.2e')} "
        f"({spent['accountant']}), {spent['steps']} steps; {hint}"
    )


def up(value: float, form: str) -> str:
    """The number in this form, rounded up: a guarantee must not look better than it is."""
    text = format(value, form)
    digit = 10.0 ** (int(text.partition("e")[2] or 0) - 2)
    return text if float(text) >= value else format(value + digit / 2, form)


def _statement(spent: dict[str, Any]) -> str:
    if spent["no_guarantee"]:
        return f"# No privacy\n\nThe model of this run is not differentially private: {spent['no_guarantee']}.\n"
    epsilon = spent["epsilon"]
    odds = f"{math.exp(epsilon):.3g}" if epsilon < 700 else f"e^{epsilon:.3g}"
    practice = PRACTICE if epsilon > LARGE_EPSILON else ""
    early = EARLY.format(**spent) if spent["steps"] < spent["planned_steps"] else ""
    hardened = "is" if spent["secure_noise"] else "is not (privacy.secure_noise=true makes it so)"
    large = spent["delta"] > LARGE_DELTA
    weak = f"\n\n**Warning.** Here {_large_delta(spent['delta'], spent['size'])}." if large else ""
    not_private = "\n".join(f"- {each}" for each in spent["not_private"])
    return f"""# What this run guarantees

The weights after {spent["steps"]} steps, those in `model/`, are
({up(spent["epsilon"], ".2f")}, {up(spent["delta"], ".2e")})-differentially private.

**Who is protected.** {spent["unit"][:1].upper()}{spent["unit"][1:]}, of {spent["size"]} in training. If a person has
several, that person's protection is weaker than stated.

**What it means.** Whatever anyone computes from the model, any outcome is at most {odds} times as likely with one
example as without it (e to the power of epsilon), but for a probability of delta.{practice}{weak}

**How it was reached.** In {spent["steps"]} steps. In each, every example was in the batch with probability
{spent["sample_rate"]:.4g}, whatever else was in it (Poisson sampling); its gradient was clipped to a norm of
{spent["max_grad_norm"]:g}, and Gaussian noise of {spent["noise_multiplier"]:.4g} times that was added to the sum.
Opacus's {spent["accountant"].upper()} accountant gives the epsilon, for adding or removing one example.
{early}
**What it assumes.** Each example's loss depends on that example alone. Noise and batches come from generators that the
operating system seeded; they are no cryptographic ones. The noise {hardened}
hardened against attacks on the gaps between floating-point numbers.

**What is not private in this folder.** Keep it, or delete it, but do not hand it on:

{not_private}

**Other runs.** This statement is of one run. Every run on the same data spends anew, those that were only tried for
better settings as well: epsilons and deltas of several runs add up.
"""
