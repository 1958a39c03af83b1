"""Private training of a run: the mechanism of its config, and the statement of the privacy that it spent."""

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
from memsave.files import replacing
from memsave.ghost import verify
from memsave.privacy import Mechanism, PrivateGradients, default_delta
from memsave.privacy.accountants import PRV_LIMIT
from memsave.privacy.audit import CanaryAudit
from memsave.processes import is_sharded
from memsave.profiler import parse_bytes
from memsave.progress import Progress
from memsave.training.checkpoint import read_noise_multiplier
from memsave.training.loop import State, TrainingError
from memsave.training.task import Task

LARGE_DELTA = 1e-3  # a larger delta is not a negligible probability
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
LARGE_EPSILON = 20.0
ACCOUNTANTS = {
    "pld": "The privacy loss distributions (PLD) of dp-accounting",
    "prv": "Opacus's PRV accountant",
    "rdp": "Opacus's RDP accountant",
}
SEVERAL = "If a person has several of them, this person's protection is weaker than stated."
SEVERAL_NAMES = """If the data name one person in several ways, such as by two spellings, or if
records of other persons mention this person, this person's protection is weaker than stated."""
PRACTICE = f"""
In practice, an epsilon above {LARGE_EPSILON:g} protects nobody."""
EARLY = """
**The run ended early,** after {steps} of {planned_steps} steps; epsilon is that of the steps taken. If it was stopped
because of a score on private data, such as a validation loss, the time of the stop reveals something about these data.
This statement does not cover that.
"""


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
    mechanism = mechanism_of(privacy, size=size, batch_size=trainer.batch_size)  # checks the numbers
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
        progress.say(f"warning: {_large_delta(delta, task.size)}")
    if privacy.seed is not None:
        progress.say(f"privacy.seed is {privacy.seed}: this run is a test and NOT private")
    elif reason := why_no_guarantee(noise_multiplier=noise, epsilon=planned):
        progress.say(f"this run is NOT private: {reason}")
    else:
        progress.say(f"planned: epsilon = {round_up(planned, '.2f')} after {trainer.steps} steps")
    if privacy.verify and privacy.passes != "direct":
        _verify(model, task, privacy, progress=progress)
    return mechanism


def mechanism_of(privacy: GhostPrivacy, *, size: int, batch_size: int) -> Mechanism:
    """The mechanism of a config, with the given noise multiplier, or with 1 before it is calibrated."""
    return Mechanism(
        size,
        batch_size,
        1.0 if privacy.noise_multiplier is None else privacy.noise_multiplier,
        privacy.max_grad_norm,
        delta=default_delta(size) if privacy.target_delta is None else privacy.target_delta,
        accountant=privacy.accountant,
        sampler=privacy.sampler,
        largest_batch=privacy.largest_batch,
        noise=privacy.noise,
        bands=1 if privacy.noise == "independent" else privacy.bands,
    )


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
        memory_budget=parse_bytes(privacy.memory_budget),
        secure_noise=privacy.secure_noise,
        seed=privacy.seed,
        audit=audit,
    )


def _large_delta(delta: float, size: int) -> str:
    return (
        f"delta is {delta:.2g} for {size} examples: with up to this probability the bound of epsilon fails, so the "
        f"guarantee is weak for any epsilon; give a smaller privacy.target_delta, such as 1e-5"
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


def why_no_guarantee(*, noise_multiplier: float, epsilon: float, seeded: bool = False) -> str | None:
    """The reason why a run has no privacy guarantee; None if it has one."""
    if seeded:
        return "noise and batches came from a fixed seed (privacy.seed)"
    if noise_multiplier == 0:
        return "no noise was added (privacy.noise_multiplier=0)"
    if epsilon == math.inf:
        return f"the noise is too small for any guarantee (noise multiplier {noise_multiplier:g})"
    return None


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


def write_statement(spent: dict[str, Any] | None, folder: Path) -> None:
    """Write `privacy.md`, the statement of the guarantee; nothing without privacy."""
    if spent is not None:
        with replacing(folder / "privacy.md") as draft:
            draft.write_text(_statement(spent))


def describe(spent: dict[str, Any]) -> str:
    """The privacy spent, in one line."""
    if spent["no_guarantee"]:
        return f"No privacy: {spent['no_guarantee']}"
    hint = "model/ may be released, privacy.md lists what may not"
    if spent["epsilon"] > LARGE_EPSILON:
        hint = "an epsilon this large protects nobody in practice"
    return (
        f"Privacy spent: epsilon = {round_up(spent['epsilon'], '.2f')} at delta = {round_up(spent['delta'], '.2e')} "
        f"({spent['accountant']}), {spent['steps']} steps; {hint}"
    )


def round_up(value: float, form: str) -> str:
    """Format the number and round it up, so that a guarantee never looks better than it is."""
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
    rows = [
        f"| {round_up(at, '.2e')} | {'none' if bound is None else round_up(bound, '.2f')} |"
        for at, bound in spent["curve"]
    ]
    curve = "\n".join(rows)
    return f"""# Privacy guarantee of this run

The weights after {spent["steps"]} steps, those in `model/`, are
({round_up(spent["epsilon"], ".2f")}, {round_up(spent["delta"], ".2e")})-differentially private.

**Who is protected.** {spent["unit"][:1].upper()}{spent["unit"][1:]}. Each of {spent["size"]} in training is one
example. {SEVERAL_NAMES if spent["unit_key"] else SEVERAL}{_canaries(spent)}

**What it means.** Any outcome of any computation on the model is at most {odds} times as likely with one example as
without it (e to the power of epsilon), except with probability delta.{practice}{weak}

**How it was reached.** {_sampling(spent)}
An example's gradient was clipped to a norm of {spent["max_grad_norm"]:g}, and Gaussian noise with a standard deviation
of {spent["noise_multiplier"]:.4g} times this norm was added to the sum of each step.{_noise(spent)}
{ACCOUNTANTS[spent["accountant"]]} computed epsilon, an upper bound, for adding or removing one example.

| delta | epsilon |
|---|---|
{curve}
{_processes(spent)}{early}
**What it assumes.** The loss of each example depends only on this example. Noise and batches come from counter-based
generators (Philox) with a secret key of 128 bits from the operating system. The noise {hardened}
hardened against attacks on the gaps between floating-point numbers.

**What is not private in this folder.** Keep it secret or delete it; do not release it:

{not_private}

**Other runs.** This statement covers one run. {_other_runs(spent["other_runs"])}
Every run on the same data spends more privacy, including runs that only tried settings. Runs on other machines, and
runs without privacy, are not in the ledger; `python -m memsave.account FOLDER...` adds up any folders of runs.
"""


def _sampling(spent: dict[str, Any]) -> str:
    """How the batches of the steps were drawn."""
    steps, rate, bins = spent["steps"], f"{spent['sample_rate']:.4g}", round(1 / spent["sample_rate"])
    return {
        "poisson": f"In each of {steps} steps, every example was in the batch with probability {rate}, independently "
        f"of the others (Poisson sampling).",
        "truncated_poisson": f"In each of {steps} steps, every example was drawn with probability {rate}, "
        f"independently of the others, and at most {spent['largest_batch']} of those drawn, chosen at random, were "
        f"taken (truncated Poisson sampling).",
        "balls_in_bins": f"In each epoch of {bins} steps, every example was in one batch, chosen at random "
        f"independently of the others (balls in bins); there were {steps} steps.",
        "cyclic": f"Every example was in one of {bins} batches, which were taken in turn for {steps} steps; the "
        f"choice of the batch adds nothing to the guarantee.",
        "cyclic_poisson": f"Every example belonged to one of {spent['bands']} groups. In each of {steps} steps, one "
        f"group had its turn, and each of its examples was in the batch with probability "
        f"{spent['sample_rate'] * spent['bands']:.4g}.",
    }[spent["sampler"]]


def _noise(spent: dict[str, Any]) -> str:
    """A sentence about correlated noise; empty for independent noise."""
    if spent["noise"] == "independent":
        return ""
    return (
        f"\nThe noise of a step cancels a part of that of earlier steps (matrix factorisation, {spent['noise']}, "
        f"{spent['bands']} bands); the standard deviation is that of its new part."
    )


def _canaries(spent: dict[str, Any]) -> str:
    """A sentence about the canaries of an audit; empty without one."""
    count = spent.get("canaries")
    return f"\n{count} of them are canaries of an audit, each included with probability 1/2." if count else ""


def _processes(spent: dict[str, Any]) -> str:
    """A paragraph about the processes of the run; empty if there was one."""
    counts = spent["processes"]
    if counts == [1]:
        return ""
    where = "each added the noise to its own part of it" if spent["sharded"] else "the noise was added to it once"
    return f"""
**Processes.** The run had {", then ".join(map(str, counts))} processes. Each step had one batch for all of them, drawn
from one secret generator. Their clipped gradients were summed, and {where}. This does not change epsilon.
"""


def _other_runs(others: dict[str, Any] | None) -> str:
    """Sentences about other runs on the same data; without names of folders, because the statement may be released."""
    if not others or not others["count"]:
        return "The ledger of this machine lists no other private run on the same data."
    count, without = others["count"], others["no_guarantee"]
    lines = [f"The ledger of this machine lists {count} other private run{'s' * (count > 1)} on the same data."]
    if others["unfinished"]:
        lines.append(f"Not ended, and counted with all planned steps: {others['unfinished']}.")
    epsilon, delta = others.get("epsilon_with_this_run"), others.get("delta_with_this_run")
    if without:
        lines.append(f"Without a guarantee: {without}. **The models of all runs together are therefore not private.**")
    if others.get("other_unit"):
        lines.append(f"Runs that protect another unit, such as single records: {others['other_unit']}.")
    if epsilon is None or delta is None:
        lines.append("Together with this run, no epsilon can be stated.")
    else:
        models = (
            "The models of the runs with a guarantee and of this run" if without else "The models of all these runs"
        )
        lines.append(
            f"{models} together are ({round_up(epsilon, '.2f')}, {round_up(delta, '.2e')})-differentially private."
        )
    return "\n".join(lines)
