"""Private training of a run: the mechanism of its config, and the privacy that it spent."""

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memsave.config import ConfigError
from memsave.config.schema import Config, GhostPrivacy
from memsave.data.loader import Index
from memsave.data.units import unit_key
from memsave.ghost import verify
from memsave.privacy import Mechanism, PrivateGradients
from memsave.privacy.accountants import PRV_LIMIT
from memsave.privacy.audit import CanaryAudit
from memsave.processes import is_sharded
from memsave.progress import Progress
from memsave.training.checkpoint import read_noise_multiplier
from memsave.training.loop import State, TrainingError
from memsave.training.statement import LARGE_DELTA, describe_large_delta, round_up, why_no_guarantee
from memsave.training.task import Task

VERIFIED = 4  # examples for the comparison with one backward per example
NOT_PRIVATE = (
    "everything except model/ and privacy.md: losses, scores, memory and the share of clipped examples depend on the "
    "data",
    "checkpoint/ and checkpoint.previous/ in particular: they hold the state of the noise generator",
    "samples.md, overlay.png: they show held-out examples unchanged",
    "the number of training examples, which privacy.md states: it is assumed to be public",
)

SAMPLERS = {
    "poisson": "Poisson sampling",
    "truncated_poisson": "truncated Poisson sampling",
    "balls_in_bins": "balls in bins",
    "cyclic": "fixed cyclic batches",
    "cyclic_poisson": "cyclic Poisson sampling",
}


def make_mechanism(
    config: Config, model: nn.Module, task: Task, *, audit: CanaryAudit | None = None, progress: Progress
) -> Mechanism | None:
    """Calibrated clipping, noise and sampling for this run; None without privacy. The model is whole.

    The mechanism counts the canaries of an audit as examples.

    Raises ConfigError if a resumed run would exceed `privacy.target_epsilon`, and TrainingError if `privacy.verify`
    finds that clipping is not exact.
    """
    privacy, trainer = config.privacy, config.trainer
    if not isinstance(privacy, GhostPrivacy):
        return None
    size = task.size if audit is None else audit.size
    mechanism = Mechanism.of_options(privacy, size=size, batch_size=trainer.batch_size)  # checks the numbers
    noise, delta = privacy.noise_multiplier, mechanism.delta
    if noise is None and trainer.resume:
        noise = read_noise_multiplier(Path(trainer.resume).expanduser())
    if noise is None:
        progress.say(f"calibrating the noise of {trainer.steps} steps to epsilon {privacy.target_epsilon:g}")
        mechanism = mechanism.calibrated(privacy.target_epsilon, steps=trainer.steps)
    else:
        mechanism = replace(mechanism, noise_multiplier=noise)
    noise = mechanism.noise_multiplier
    progress.say(
        f"private: {task.size} examples, batches of {trainer.batch_size} by {SAMPLERS[mechanism.sampler]}, noise "
        f"multiplier {noise:.3f}, C = {privacy.max_grad_norm:g}, delta = {delta:.2e}"
    )
    if mechanism.noise != "independent":
        progress.say(compared_noise(mechanism, steps=trainer.steps))
    planned = mechanism.epsilon(trainer.steps)  # raises before the first step if it cannot be computed
    if privacy.noise_multiplier is None and planned > privacy.target_epsilon + 1e-6:
        raise ConfigError(
            f"{trainer.steps} steps with the checkpoint's noise multiplier {noise:.4g} would spend epsilon "
            f"{round_up(planned, '.2f')}, more than privacy.target_epsilon={privacy.target_epsilon:g}; give fewer "
            f"trainer.steps, or privacy.target_epsilon={round_up(planned, '.2f')}"
        )
    if delta > LARGE_DELTA:
        progress.say(f"warning: {describe_large_delta(delta, task.size)}")
    if privacy.seed is not None:
        progress.say(f"privacy.seed is {privacy.seed}: this run is a test and NOT private")
    elif reason := why_no_guarantee(noise_multiplier=noise, epsilon=planned):
        progress.say(f"this run is NOT private: {reason}")
    else:
        progress.say(f"planned: epsilon = {round_up(planned, '.2f')} after {trainer.steps} steps")
    if privacy.verify and privacy.passes != "direct":
        _verify(model, task, privacy, progress=progress)
    return mechanism


def compared_noise(mechanism: Mechanism, *, steps: int) -> str:
    """The expected error of correlated noise beside that of DP-SGD at the same epsilon, as a sentence."""
    epsilon = mechanism.epsilon(steps)
    if not 0 < epsilon < math.inf:
        return f"noise={mechanism.noise} without a guarantee is not compared with independent noise"
    usual = replace(mechanism, noise="independent", bands=1, sampler="poisson", accountant="pld")
    ratio = mechanism.error_of_sums(steps) / usual.calibrated(epsilon, steps=steps).error_of_sums(steps)
    verdict = "it helps" if ratio < 1 else "it does not help: independent noise with Poisson batches is better here"
    return (
        f"noise={mechanism.noise} with sampler={mechanism.sampler} moves sums of gradients {ratio:.2f} times as far as "
        f"independent noise with Poisson batches at the same epsilon; {verdict}"
    )


def make_private(
    config: Config, model: nn.Module, mechanism: Mechanism | None, *, audit: CanaryAudit | None = None
) -> PrivateGradients | None:
    """The private gradients of the model, which may be sharded; None without privacy."""
    privacy = config.privacy
    if mechanism is None or not isinstance(privacy, GhostPrivacy):
        return None
    return PrivateGradients(
        model,
        mechanism,
        clipping=privacy.clipping,
        passes=privacy.passes,
        memory_budget=privacy.kept_bytes,
        secure_noise=privacy.secure_noise,
        seed=privacy.seed,
        audit=audit,
    )


def _verify(model: nn.Module, task: Task, privacy: GhostPrivacy, *, progress: Progress) -> None:
    """Raise TrainingError if clipping is not exact on the first examples."""
    progress.say("comparing clipped gradients with one backward per example")
    batch = task.place(task.load([Index(example, example) for example in range(min(VERIFIED, task.size))]))
    tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    options: dict[str, Any] = {"passes": privacy.passes, "clipping": privacy.clipping}
    report = verify(model, tensors, task.per_example_losses, **options)
    if not report.ok:
        raise TrainingError(f"clipping would not be exact: {'; '.join(report.findings)}")


def privacy_result(
    config: Config, state: State, *, unit: str, other_runs: Callable[..., dict[str, Any] | None]
) -> dict[str, Any] | None:
    """The privacy spent so far, as the key `privacy` of `result.json`; None without privacy.

    `other_runs(steps=)` is that of `memsave.training.ledger.RunLedger`.
    """
    privacy, private = config.privacy, state.private
    if private is None or not isinstance(privacy, GhostPrivacy):
        return None
    mechanism, epsilon = private.mechanism, private.epsilon
    noise = mechanism.noise_multiplier
    reason = why_no_guarantee(noise_multiplier=noise, epsilon=epsilon, seeded=private.seeded)
    return {
        "epsilon": None if reason else epsilon,
        "no_guarantee": reason,
        **{key: value for key, value in asdict(mechanism).items() if key != "batch_size"},
        "mechanism": asdict(mechanism),
        "accountant": "rdp" if mechanism.accountant == "prv" and epsilon > PRV_LIMIT else mechanism.accountant,
        "expected_batch_size": mechanism.batch_size,
        "sample_rate": mechanism.sample_rate,
        "steps": private.steps,
        "planned_steps": config.trainer.steps,
        "unit": unit,
        "unit_key": unit_key(config.data),
        "adjacency": "add or remove one",
        "curve": [[each, None if bound == math.inf else bound] for each, bound in _curve(mechanism, private.steps)],
        "clipping": privacy.clipping,
        "clipped_fraction": private.clipped / max(1, private.examples),
        "secure_noise": privacy.secure_noise,
        "seeded": private.seeded,
        "processes": state.processes,
        "sharded": any(is_sharded(p) for p in state.model.parameters()),
        "nonfinite_examples": private.nonfinite,
        **({} if private.audit is None else {"canaries": private.audit.size - private.audit.examples}),
        "run": state.run,
        "other_runs": other_runs(steps=private.steps),
        "not_private": list(NOT_PRIVATE),
    }


def _curve(mechanism: Mechanism, steps: int) -> list[tuple[float, float]]:
    """(delta, an upper bound of epsilon) for some deltas around that of the run."""
    deltas = [
        mechanism.delta * factor for factor in (10, 1, 0.1, 0.01) if mechanism.delta * factor < 1 / mechanism.size
    ]
    return list(zip(deltas, mechanism.curve(steps, deltas), strict=True))
