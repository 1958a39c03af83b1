"""Scores over the folds of a cross-validation, from the jobs of a sweep over `data.fold`.

The mean and the standard deviation are over the folds, as papers give them. The pooled score is the mean over the
held-out cases of all folds: each case is held out once, so it is the score of the whole data set.
"""

import csv
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLD, FOLDS = "data.fold", "data.folds"
TABLE = "scores.csv"


@dataclass(frozen=True)
class Validation:
    """The folds of one setting."""

    setting: Mapping[str, Any]
    """The config keys in which this setting differs from others of the sweep."""
    folds: int
    found: Mapping[int, Mapping[str, float]]
    """By fold: the mean of each score over its held-out cases."""
    cases: Mapping[str, Mapping[str, float]]
    """By case: its scores."""

    @property
    def missing(self) -> list[int]:
        """The folds without scores."""
        return [number for number in range(self.folds) if number not in self.found]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield a row for each score."""
        for name in next(iter(self.found.values())):
            each = [scores[name] for scores in self.found.values()]
            yield {
                **self.setting,
                "score": name,
                "mean": statistics.fmean(each),
                "standard deviation": statistics.stdev(each) if len(each) > 1 else None,
                "pooled": statistics.fmean(scores[name] for scores in self.cases.values()),
                "folds": len(each),
                "cases": len(self.cases),
            }


def validations(jobs: Sequence[Any], keys: Sequence[str]) -> Iterator[Validation]:
    """Yield the cross-validations of two or more folds among the jobs of a sweep, which differ in `keys`."""
    groups: dict[str, list[Any]] = {}
    for job in jobs:
        if job.config.get(FOLDS):
            setting = {key: value for key, value in job.config.items() if key not in (FOLD, "trainer.resume")}
            groups.setdefault(repr(sorted(setting.items())), []).append(job)
    for group in groups.values():
        found, cases = dict[int, dict[str, float]](), dict[str, dict[str, float]]()
        for job in group:
            scores = read_scores(job.folder / TABLE) if job.status == "ok" else {}
            if scores:
                names = next(iter(scores.values()))
                found[int(job.config[FOLD])] = {
                    name: statistics.fmean(row[name] for row in scores.values()) for name in names
                }
                cases |= scores
        if len(found) > 1:
            first = group[0].config
            setting = {key: first.get(key) for key in keys if key != FOLD}
            yield Validation(setting, int(first[FOLDS]), dict(sorted(found.items())), cases)


def read_scores(path: Path) -> dict[str, dict[str, float]]:
    """The scores of each case in a `scores.csv`; empty if it cannot be read."""
    try:
        with path.open(newline="") as file:
            return {
                row["case"]: {name: float(value) for name, value in row.items() if name != "case"}
                for row in csv.DictReader(file)
            }
    except (OSError, ValueError, KeyError, TypeError):
        return {}
