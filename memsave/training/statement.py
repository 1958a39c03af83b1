"""`privacy.md`: the statement of the privacy that a run spent, and what numbers of privacy say in words."""

import math
import textwrap
from pathlib import Path
from typing import Any

from memsave.files import replacing

LARGE_DELTA = 1e-3  # a larger delta is not a negligible probability
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


def why_no_guarantee(*, noise_multiplier: float, epsilon: float, seeded: bool = False) -> str | None:
    """The reason why a run has no privacy guarantee; None if it has one."""
    if seeded:
        return "noise and batches came from a fixed seed (privacy.seed)"
    if noise_multiplier == 0:
        return "no noise was added (privacy.noise_multiplier=0)"
    if epsilon == math.inf:
        return f"the noise is too small for any guarantee (noise multiplier {noise_multiplier:g})"
    return None


def describe_large_delta(delta: float, size: int) -> str:
    """What a delta above `LARGE_DELTA` means."""
    return (
        f"delta is {delta:.2g} for {size} examples: with up to this probability the bound of epsilon fails, so the "
        f"guarantee is weak for any epsilon; give a smaller privacy.target_delta, such as 1e-5"
    )


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
    weak = f"\n\n**Warning.** Here {describe_large_delta(spent['delta'], spent['size'])}." if large else ""
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

{_how(spent)}

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


def _how(spent: dict[str, Any]) -> str:
    """A paragraph about sampling, clipping, noise and accounting."""
    return textwrap.fill(
        f"**How it was reached.** {_sampling(spent)} An example's gradient was clipped to a norm of "
        f"{spent['max_grad_norm']:g}, and Gaussian noise with a standard deviation of {spent['noise_multiplier']:.4g} "
        f"times this norm was added to the sum of each step. {_noise(spent)}{ACCOUNTANTS[spent['accountant']]} "
        f"computed epsilon, an upper bound, for adding or removing one example.",
        width=120,
        break_on_hyphens=False,
    )


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
        f"The noise of a step cancels a part of that of earlier steps (matrix factorisation, {spent['noise']}, "
        f"{spent['bands']} bands); the standard deviation is that of its new part. "
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
