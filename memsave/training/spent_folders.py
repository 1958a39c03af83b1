"""`Spending` of runs, read from their folders: of finished, interrupted, failed and killed runs, and of plain ones."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from memsave.files import parse_json
from memsave.privacy import Mechanism
from memsave.training.checkpoint import read_state
from memsave.training.result import read_config, read_result
from memsave.training.spending import Spending, check_mechanism
from memsave.training.statement import why_no_guarantee

PLAIN = "it was trained without privacy"
UNKNOWN = "its files do not name its mechanism"


def runs_in(folder: Path) -> Iterator[Path]:
    """The folders of runs at and below `folder`: the jobs of a sweep in their order, everything else by name."""
    if (folder / "config.yaml").is_file() or (folder / "result.json").is_file():
        yield folder
        return
    inner = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink() and path.name[0] != "."]
    for path in sorted(
        inner, key=lambda path: (path.name.isdigit(), int(path.name) if path.name.isdigit() else 0, path)
    ):
        yield from runs_in(path)


def read_spending(folder: Path) -> Spending | None:
    """What the run in `folder` spent; None for a plan, and for a run that took no step or left no result of its steps.

    A killed run has no result: its checkpoint names the mechanism, and its log the steps.
    """
    result, config, state = read_result(folder), read_config(folder), read_state(folder)
    if config.get("mode") == "plan":
        return None
    run = str(folder.resolve())
    data = _mapping(result, "data").get("fingerprint") or state.get("data")
    unit = _mapping(config, "data").get("unit")
    kind = _mapping(config, "privacy").get("kind")
    if found := _mapping(result, "privacy"):
        return _private(found, folder, data=data, run=found.get("run") or run, unit=unit)
    if found := _mapping(state, "private"):
        return _killed(found, folder, data=data, run=state.get("run") or run, unit=unit)
    took_steps = result.get("status") == "ok" or bool(state)
    if kind not in (None, "none") or not took_steps:
        return None
    return Spending(run, str(folder), data, steps=1, no_guarantee=PLAIN)


def by_data(spendings: Iterable[Spending]) -> dict[str | None, list[Spending]]:
    """The runs of each data set, in the order in which the data sets occur."""
    found: dict[str | None, list[Spending]] = {}
    for each in spendings:
        found.setdefault(each.data, []).append(each)
    return found


def _private(
    found: Mapping[str, Any], folder: Path, *, data: str | None, run: str, unit: str | None
) -> Spending | None:
    """From the entry `privacy` of `result.json`."""
    try:
        if not int(found["steps"]):
            return None
        spending = Spending(
            run,
            str(folder),
            data,
            steps=int(found["steps"]),
            no_guarantee=found["no_guarantee"],
            noise_multiplier=found["noise_multiplier"],
            sample_rate=found["sample_rate"],
            delta=found["delta"],
            accountant=found["accountant"],
            size=found["size"],
            mechanism=found.get("mechanism"),
            epsilon=found["epsilon"],
            unit=unit,
        )
        check_mechanism(spending)
        return spending
    except (KeyError, TypeError, ValueError):
        return Spending(run, str(folder), data, steps=1, no_guarantee=UNKNOWN)


def _killed(found: Mapping[str, Any], folder: Path, *, data: str | None, run: str, unit: str | None) -> Spending | None:
    """From the checkpoint of a run without a result: it was killed, or is still training."""
    try:
        mechanism = Mechanism(**found["mechanism"])
        steps = max(int(found["steps"]), _logged_steps(folder))
        if not steps:
            return None
        how: dict[str, Any] = {"noise_multiplier": mechanism.noise_multiplier, "sample_rate": mechanism.sample_rate}
        how |= {"delta": mechanism.delta, "accountant": mechanism.accountant, "mechanism": found["mechanism"]}
        epsilon = mechanism.epsilon(steps)
        how["unit"] = unit
        seeded = bool(found["seeded"])
        reason = why_no_guarantee(noise_multiplier=mechanism.noise_multiplier, epsilon=epsilon, seeded=seeded)
        alone = None if reason else epsilon
        return Spending(
            run, str(folder), data, steps, reason, size=mechanism.size, epsilon=alone, unfinished=True, **how
        )
    except (KeyError, TypeError, ValueError):
        return Spending(run, str(folder), data, steps=1, no_guarantee=UNKNOWN, unfinished=True)


def _logged_steps(folder: Path) -> int:
    """The last step in `metrics.jsonl`, which has a line for each step; 0 without one."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(parse_json(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue  # a line that was cut off
    return 0


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = content.get(key)
    return found if isinstance(found, Mapping) else {}
