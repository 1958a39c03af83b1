"""A run's privacy: the mechanism that its config asks for, and the statement of what it spent."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memsave.config import Config, GhostPrivacy
from memsave.ghost import verify
from memsave.privacy import Mechanism, PrivateGradients, default_delta, noise_multiplier_for
from memsave.profiler import parse_bytes
from memsave.training.loop import State, TrainingError
from memsave.training.progress import Progress
from memsave.training.task import Batch, Task

VERIFIED = 4  # examples of the first batch that are differentiated one by one
NOT_PRIVATE = (
    "everything but model/ and privacy.md: losses, scores, memory and the share of clipped examples follow the data",
    "checkpoint/ and checkpoint.previous/ above all: they hold the state of the noise generator",
    "samples.md, overlay.png: they show held-out examples as they are",
    "the number of training examples, which privacy.md names: it is taken as public",
)


def make_private(config: Config, model: nn.Module, task: Task, *, progress: Progress) -> PrivateGradients | None:
    """Clipping, noise and sampling for this run, calibrated; None without privacy."""
    privacy, trainer = config.privacy, config.trainer
    if not isinstance(privacy, GhostPrivacy):
        return None
    size, batch_size = task.size, trainer.batch_size
    delta = default_delta(size) if privacy.target_delta is None else privacy.target_delta
    known: dict[str, Any] = {"delta": delta, "accountant": privacy.accountant}
    # of noise 1, to have sizes and delta refused before the calibration looks at them
    Mechanism(size, batch_size, 1.0, privacy.max_grad_norm, **known)
    noise = privacy.noise_multiplier
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
    if privacy.seed is not None:
        progress.say(f"privacy.seed is {privacy.seed}: this run is a test and NOT private")
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


def _verify(model: nn.Module, task: Task, privacy: GhostPrivacy, *, progress: Progress) -> None:
    """Stop a run whose clipping is not exact on its first examples."""
    progress.say("comparing clipped gradients with one backward per example")
    batch: Batch = task.gather(range(min(VERIFIED, task.size)), step=0)
    tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    options: dict[str, Any] = {"passes": privacy.passes, "clipping": privacy.clipping}
    report = verify(model, tensors, task.per_example_losses, **options)
    if not report.ok:
        raise TrainingError(f"clipping would not be exact: {'; '.join(report.findings)}")


def write_statement(
    config: Config, state: State, task: Task, folder: Path, *, progress: Progress
) -> dict[str, Any] | None:
    """Say what was spent, in `privacy.md` and on the terminal; returns the entry of `result.json`."""
    private, privacy = state.private, config.privacy
    if private is None or not isinstance(privacy, GhostPrivacy):
        return None
    mechanism = private.mechanism
    epsilon = private.epsilon
    spent = {
        "epsilon": epsilon if epsilon < float("inf") and not private.seeded else None,
        **{key: value for key, value in asdict(mechanism).items() if key != "batch_size"},
        "expected_batch_size": mechanism.batch_size,
        "sample_rate": mechanism.sample_rate,
        "steps": private.steps,
        "unit": task.unit,
        "adjacency": "add or remove one",
        "sampler": "poisson",
        "clipping": privacy.clipping,
        "clipped_fraction": private.clipped / max(1, private.examples),
        "secure_noise": privacy.secure_noise,
        "seeded": private.seeded,
        "nonfinite_examples": private.nonfinite,
        "not_private": list(NOT_PRIVATE),
    }
    (folder / "privacy.md").write_text(_statement(spent))
    progress.say(
        f"Privacy spent: epsilon = {up(epsilon, '.2f')} at delta = {up(mechanism.delta, '.2e')} "
        f"({mechanism.accountant}), {private.steps} steps; model/ may be released, privacy.md says what may not"
        if spent["epsilon"] is not None
        else "No privacy: the noise was seeded or zero"
    )
    return spent


def up(value: float, form: str) -> str:
    """The number in this form, rounded up: a guarantee must not look better than it is."""
    text = format(value, form)
    digit = 10.0 ** (int(text.partition("e")[2] or 0) - 2)
    return text if float(text) >= value else format(value + digit / 2, form)


def _statement(spent: dict[str, Any]) -> str:
    if spent["epsilon"] is None:
        return (
            "# No privacy\n\nThis run was given a fixed seed, or no noise. Its model is not differentially private.\n"
        )
    odds = 2.718281828459045 ** spent["epsilon"]
    hardened = "is" if spent["secure_noise"] else "is not (privacy.secure_noise=true makes it so)"
    not_private = "\n".join(f"- {each}" for each in spent["not_private"])
    return f"""# What this run guarantees

The model in `model/` is ({up(spent["epsilon"], ".2f")}, {up(spent["delta"], ".2e")})-differentially private.

**Who is protected.** {spent["unit"][:1].upper()}{spent["unit"][1:]}, of {spent["size"]} in training. If a person has
several, that person's protection is weaker than stated.

**What it means.** Whatever anyone computes from the model, any outcome is at most {odds:.3g} times as likely with one
example as without it (e to the power of epsilon), but for a probability of delta.

**How it was reached.** In {spent["steps"]} steps. In each, every example was in the batch with probability
{spent["sample_rate"]:.4g}, whatever else was in it (Poisson sampling); its gradient was clipped to a norm of
{spent["max_grad_norm"]:g}, and Gaussian noise of {spent["noise_multiplier"]:.4g} times that was added to the sum.
Opacus's {spent["accountant"].upper()} accountant gives the epsilon, for adding or removing one example.

**What it assumes.** Each example's loss depends on that example alone. Noise and batches come from generators that the
operating system seeded; they are no cryptographic ones. The noise {hardened}
hardened against attacks on the gaps between floating-point numbers.

**What is not private in this folder.** Keep it, or delete it, but do not hand it on:

{not_private}

**Other runs.** This statement is of one run. Every run on the same data spends anew, those that were only tried for
better settings as well: epsilons and deltas of several runs add up.
"""
