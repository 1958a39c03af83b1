"""The ledger: which private runs have trained on a data set, and what they spent.

    cache_root()/ledger/DATA/RUN.json      DATA is the fingerprint of the raw data, RUN the id of a run

A run writes its entry before its first step, at every checkpoint, and when it ends. A continued run keeps its id and
its entry. A run that has not reported its end, because it is still training or was killed, counts with all of its
planned steps: the ledger never counts too little. A cache that cannot be written stops no run.

The ledger belongs to a machine and knows only runs with noise in their config. Folders with runs from anywhere are
added up by `python -m memsave.account`.
"""

from collections.abc import Callable
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from memsave.data.cache import cache_root
from memsave.files import parse_json, write_json
from memsave.processes import process_rank
from memsave.training.loop import State
from memsave.training.spending import Spending, Total, check_mechanism, once, total_or_none
from memsave.training.statement import round_up, why_no_guarantee

UNREADABLE = "its entry in the ledger cannot be read"
FIELDS = {each.name for each in fields(Spending)}


def read_entries(data: str) -> list[Spending]:
    """The runs that the ledger lists for this data; an entry that cannot be read counts as a run without guarantee."""
    folder = cache_root() / "ledger" / data
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".json" and not path.name.startswith("."))
    except OSError:
        return []
    return [_read(path, data=data) for path in paths]


def _read(path: Path, *, data: str) -> Spending:
    try:
        content = parse_json(path.read_text())
        steps = max(content["steps"], content["planned_steps"]) if content["unfinished"] else content["steps"]
        known = {key: value for key, value in content.items() if key in FIELDS}
        found = Spending(**{**known, "run": path.stem, "data": data, "steps": int(steps)})
        check_mechanism(found)
        return found
    except (OSError, ValueError, KeyError, TypeError):
        return Spending(path.stem, str(path), data, steps=1, no_guarantee=UNREADABLE)


class RunLedger:
    """The entry of one run, and what other runs have spent on its data. Does nothing in a run without privacy.

    Args:
        state: of the run, after a checkpoint was loaded.
        folder: of the run.
        steps: the planned steps.
        say: called with one line of text if the ledger cannot be written.
    """

    def __init__(self, state: State, folder: Path, *, steps: int, say: Callable[[str], None]):
        self.state, self.folder, self.steps, self.say = state, folder, steps, say
        self.path = cache_root() / "ledger" / str(state.data) / f"{state.run}.json"
        self.started = self.broken = False
        self._before = 0  # steps in the entry: a run that continues from an older checkpoint has taken more
        self._no_guarantee: str | None = None
        if state.private is not None and self.path.is_file():
            self._before = _taken(self.path)
        if state.private is not None:
            self._no_guarantee = why_no_guarantee(
                noise_multiplier=state.private.mechanism.noise_multiplier,
                epsilon=state.private.mechanism.epsilon(steps),
                seeded=state.private.seeded,
            )

    def start(self) -> None:
        """Write the entry before the first step."""
        self.started = True
        self.update()

    def update(self, *, ended: bool = False) -> None:
        """Write the steps taken so far; a run that has not started has no entry."""
        if self.state.private is None or self.broken or not self.started or process_rank() > 0:
            return
        entry = {
            **asdict(self.own(steps=max(self._before, self.state.private.steps))),
            "unfinished": not ended,
            "planned_steps": self.steps,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, entry)
        except OSError as error:
            self.broken = True
            self.say(
                f"the ledger {self.path} cannot be written ({error.strerror or error}), so later runs on these data "
                f"will not count this run; set MEMSAVE_CACHE to another folder"
            )

    def own(self, *, steps: int) -> Spending:
        """This run, with that many steps. Only for a private run."""
        assert self.state.private is not None
        mechanism = self.state.private.mechanism
        return Spending(
            self.state.run,
            str(self.folder.resolve()),
            self.state.data,
            steps=steps,
            no_guarantee=self._no_guarantee,
            noise_multiplier=mechanism.noise_multiplier,
            sample_rate=mechanism.sample_rate,
            delta=mechanism.delta,
            accountant=mechanism.accountant,
            size=mechanism.size,
            mechanism=asdict(mechanism),
            unit=self.state.identity.get("data.unit"),
        )

    def other_runs(self, *, steps: int) -> dict[str, Any] | None:
        """What other runs have spent on the same data, alone and with `steps` steps of this run.

        None without privacy. In `result.json` this is the key `privacy.other_runs`.
        """
        if self.state.private is None or self.state.data is None:
            return None
        others = [each for each in once(read_entries(self.state.data)) if each.run != self.state.run and each.steps]
        found = total_or_none(others)
        own = self.own(steps=steps)
        together = total_or_none([*others, own]) if others and own.no_guarantee is None else None
        return {
            "count": len(others),
            "no_guarantee": found.without,
            "unfinished": found.unfinished,
            "other_unit": sum(each.unit != own.unit and each.no_guarantee is None for each in others),
            **_bound("", found),
            **(_bound("_with_this_run", together) if together else {}),
        }


def describe_others(others: dict[str, Any] | None) -> str | None:
    """One line about earlier runs, for the start of a run; None if there are none."""
    if not others or not others["count"]:
        return None
    count, without = others["count"], others["no_guarantee"]
    text = f"{count} other private run{'s' * (count > 1)} on the same data"
    if others["unfinished"]:
        text += f" ({others['unfinished']} not ended, counted with all planned steps)"
    if others["epsilon"] is not None:
        text += f" spent {bound(others, '')}"
    if others.get("epsilon_with_this_run") is not None:
        text += f"; with this run {bound(others, '_with_this_run')}"
    if others.get("other_unit"):
        text += f"; {others['other_unit']} of them with another data.unit, so no epsilon of all together is known"
    if without:
        text += f"; {without} of them {'has' if without == 1 else 'have'} no guarantee, so all together have none"
    return text


def bound(others: dict[str, Any], which: str) -> str:
    """Epsilon and delta of an entry of `other_runs`."""
    return (
        f"epsilon = {round_up(others[f'epsilon{which}'], '.2f')} at delta = {round_up(others[f'delta{which}'], '.2e')}"
    )


def _bound(which: str, found: Total) -> dict[str, Any]:
    return {f"epsilon{which}": found.epsilon, f"delta{which}": found.delta, f"accountant{which}": found.accountant}


def _taken(path: Path) -> int:
    """The steps in an entry; 0 if it cannot be read."""
    try:
        return int(parse_json(path.read_text())["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
