"""Adds up the privacy that several runs have spent on the same data.

    python -m memsave.account outputs/gpt2_dp
    python -m memsave.account multirun/gpt2_dp/2026-01-31_10-00-00 outputs/gpt2_dp/2026-02-01_09-00-00
    python -m memsave.account outputs multirun delta=1e-6

Each folder is that of a run or of a sweep, or contains such folders. Runs on the same data are composed, which gives a
smaller epsilon than the sum of their epsilons; runs on different data are listed apart. A run that was continued in
another folder counts once. An interrupted or killed run counts with the steps that it took.

Keys: delta=, for all runs together (default: the smallest delta of the runs, so that the result holds wherever the
statement of each run does); accountant=pld (default), prv or rdp. Exit codes: 0, or 2 if there is nothing to add up.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from memsave.arguments import ArgumentError, parse_arguments
from memsave.collect import markdown
from memsave.privacy import PrivacyError
from memsave.training.spending import Spending, Total, once, total
from memsave.training.spent_folders import by_data, read_spending, runs_in
from memsave.training.statement import round_up


@dataclass
class Options:
    """The keys of the command line."""

    delta: float | None = field(
        default=None, metadata={"expects": "a number above 0 and below 1 / number of examples, as in delta=1e-6"}
    )
    accountant: str = "pld"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or {"-h", "--help"} & set(given):
        print(__doc__)
        return 0 if given else 2
    # a path may hold an equals sign, as in multirun/lr=0.1
    keys = [each for each in given if "=" in each and not Path(each).expanduser().exists()]
    try:
        options = parse_arguments(keys, Options, example="delta=1e-6")
        spendings = read_runs([Path(each).expanduser() for each in given if each not in keys])
        text = "\n\n".join(
            line
            for group in by_data(once(spendings)).values()
            for line in _report(group, Counter(each.run for each in spendings), options)
        )
    except (ArgumentError, PrivacyError) as error:
        print(f"memsave: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


def read_runs(folders: Sequence[Path]) -> list[Spending]:
    """What the runs in these folders spent, each folder once. Raises ArgumentError if no run took a step."""
    if not folders:
        raise ArgumentError("no folder is given; name folders of runs or of sweeps, as in outputs/gpt2_dp")
    found: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ArgumentError(f"{folder} is not a folder; name folders of runs or of sweeps, as in outputs/gpt2_dp")
        found |= {path.resolve(): path for path in runs_in(folder)}
    spendings = [spent for path in found.values() if (spent := read_spending(path)) is not None]
    if not spendings:
        where = ", ".join(map(str, folders))
        raise ArgumentError(f"{where}: no run there has taken a step; name folders of runs or of sweeps that trained")
    return spendings


def _report(group: Sequence[Spending], folders: Counter[str], options: Options) -> Iterator[str]:
    """A heading, the table of the runs, and what they spent together."""
    found = total(group, delta=options.delta, accountant=options.accountant)
    name = "unknown (runs of an earlier version, taken as one data set)" if group[0].data is None else group[0].data
    yield f"Data {name}: {len(group)} run{'s' * (len(group) > 1)}"
    yield markdown([_row(each, folders=folders[each.run]) for each in group])
    yield "\n".join(_sentences(group, found))


def _row(each: Spending, *, folders: int) -> dict[str, object]:
    notes = [each.no_guarantee] if each.no_guarantee else []
    notes += [f"protects units of data.unit={each.unit}"] if each.unit else []
    notes += ["no result: killed, or still training"] if each.unfinished else []
    notes += [f"continued in {folders} folders, counted once"] if folders > 1 else []
    mechanism = each.noise_multiplier > 0
    return {
        "run": each.folder,
        "epsilon alone": "none" if each.epsilon is None else round_up(each.epsilon, ".2f"),
        "delta": f"{each.delta:.3g}" if mechanism else None,
        "noise": f"{each.noise_multiplier:.4g}" if mechanism else None,
        "sample rate": f"{each.sample_rate:.4g}" if mechanism else None,
        "steps": each.steps if mechanism else None,
        "note": "; ".join(notes) or None,
    }


def _sentences(group: Sequence[Spending], found: Total) -> Iterator[str]:
    """What the runs spent together, and what it means."""
    which = " with a guarantee" if found.without else ""
    runs = f"the {found.private} runs{which} together" if found.private > 1 else f"the run{which}"
    if found.units > 1:
        yield (
            f"{runs[0].upper()}{runs[1:]} protect different units (data.unit), such as records and persons, so they "
            f"have no common epsilon."
        )
    elif found.private and (found.epsilon is None or found.delta is None):
        yield f"No accountant can compute a finite epsilon of {runs}."
    elif found.epsilon is not None and found.delta is not None:
        epsilon = round_up(found.epsilon, ".2f")
        alone = [each.epsilon for each in group if each.epsilon is not None]
        added = f" (added up, their epsilons would be {round_up(sum(alone), '.2f')})" if len(alone) > 1 else ""
        yield (
            f"{runs[0].upper()}{runs[1:]} spent epsilon = {epsilon} at delta = {round_up(found.delta, '.2e')} "
            f"({found.accountant}){added}."
        )
        odds = f"{math.exp(found.epsilon):.3g}" if found.epsilon < 700 else f"e^{epsilon}"
        yield (
            f"Any outcome of any computation on the released models is at most {odds} times as likely with one example "
            f"as without it, except with probability delta."
        )
    if found.without:
        are, none = ("run has", "it") if found.without == 1 else ("runs have", "them")
        yield (
            f"{found.without} {are} no guarantee, so all runs together have none: an epsilon above holds only if "
            f"nothing of {none} is released or used for a choice."
        )


if __name__ == "__main__":
    sys.exit(main())
