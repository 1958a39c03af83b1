"""Collects the results of a sweep in one table and one picture.

    python -m memsave.collect multirun/brats_rev/2026-01-31_10-00-00

reads `config.yaml` and `result.json` of every job, with any status, and writes `sweep.md`, `sweep.csv` and `sweep.png`
to the folder. The table lists the config keys in which the jobs differ. Below it stand the scores over the folds of a
cross-validation (also in `folds.csv`), and what private jobs on the same data spent together. Jobs without a result are
reported. A sweep calls this when it ends. Exit codes: 0, or 2 if the folder contains no jobs.
"""

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memsave.folds import Validation, validations
from memsave.profiler import format_bytes
from memsave.training.result import flatten, read_config, read_result

NO_RESULT = "no result"
CSV_ONLY = ("size", "budget_bytes")  # columns whose values the Markdown table has in words
IGNORED_KEYS = ("trainer.resume", "data.root")  # paths, which do not describe a job


@dataclass(frozen=True)
class Job:
    """One job of a sweep."""

    folder: Path
    config: Mapping[str, Any]
    """By dotted key."""
    result: Mapping[str, Any]
    """`result.json`; empty if it is missing or incomplete."""

    @property
    def status(self) -> str:
        """The status in the result, or NO_RESULT."""
        return str(self.result.get("status") or NO_RESULT)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if len(given) != 1 or given[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if given else 2
    folder = Path(given[0]).expanduser()
    if not folder.is_dir() or not read_jobs(folder):
        fault = "is one run, not a sweep" if (folder / "config.yaml").exists() else "holds no jobs"
        print(f"memsave: {folder} {fault}; name a sweep's folder, multirun/EXPERIMENT/TIME", file=sys.stderr)
        return 2
    collect(folder)
    return 0


def collect(folder: Path) -> list[Job]:
    """Write the table and the picture, print the table, and return the jobs."""
    jobs = read_jobs(folder)
    rows = [row for job in jobs for row in rows_of(job, varied_keys(jobs))]
    text = markdown(rows)
    text += fold_text(list(validations(jobs, varied_keys(jobs))), folder)
    text += "".join(f"\n\n{line}" for line in privacy_lines(jobs))
    missing = [str(job.folder) for job in jobs if job.status == NO_RESULT]
    if missing:
        text += f"\n\nJobs without a result: {', '.join(missing)}"
    (folder / "sweep.md").write_text(f"# {folder.name}\n\n{text}\n")
    _write_csv(rows, folder / "sweep.csv")
    try:
        from memsave.sweep_picture import draw

        draw(rows, folder / "sweep.png")
    except ModuleNotFoundError:
        print("memsave: no picture without matplotlib; install it with: pip install matplotlib", file=sys.stderr)
    print(f"{text}\n\nwritten to {folder}: sweep.md, sweep.csv, sweep.png")
    return jobs


def fold_text(found: Sequence[Validation], folder: Path) -> str:
    """A table of the cross-validations, which is also written as `folds.csv`; empty without any."""
    if not found:
        return ""
    rows = [row for each in found for row in each.rows()]
    _write_csv(rows, folder / "folds.csv")
    title = (
        f"Over {found[0].folds} folds: the mean and the standard deviation of the folds, and the mean over all cases"
    )
    text = f"\n\n{title}:\n\n{markdown(rows)}"
    for each in found:
        if each.missing:
            setting = "".join(f" with {key}={value}" for key, value in each.setting.items())
            text += f"\n\nWithout scores{setting}: fold {', '.join(map(str, each.missing))} of {each.folds}."
    return text


def _write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(columns_of(rows)))
        table.writeheader()
        table.writerows(rows)


def privacy_lines(jobs: Sequence[Job]) -> Iterator[str]:
    """Yield what several jobs on the same data spent together; nothing for a sweep without private jobs."""
    from memsave.training.ledger import bound
    from memsave.training.spending import once, total_or_none
    from memsave.training.spent_folders import by_data, read_spending

    spendings = once(found for job in jobs if (found := read_spending(job.folder)) is not None)
    groups = by_data(spendings)
    for data, group in groups.items():
        together = total_or_none(group)
        if len(group) < 2 or not together.private:
            continue
        where = f" on the data {data}" if len(groups) > 1 else ""
        spent = "an epsilon that cannot be computed" if together.epsilon is None else bound(vars(together), "")
        more, several = together.without, "s" * (together.private > 1)
        none = f"; {more} more without a guarantee, so all jobs together have none" if more else ""
        yield (
            f"Privacy: {together.private} private job{several}{where} spent {spent} together{none}. "
            f"The column epsilon is that of each job alone."
        )


def read_jobs(folder: Path) -> list[Job]:
    """The jobs of a sweep's folder, by number."""
    found = [path for path in folder.iterdir() if path.is_dir()]
    jobs = []
    for path in sorted(found, key=lambda path: (not path.name.isdigit(), int(path.name) if path.name.isdigit() else 0)):
        if (path / "config.yaml").exists() or (path / "result.json").exists():
            jobs.append(Job(path, dict(flatten(read_config(path))), read_result(path)))
    return jobs


def varied_keys(jobs: Sequence[Job]) -> list[str]:
    """The config keys in which the jobs differ, except IGNORED_KEYS."""
    keys = dict.fromkeys(key for job in jobs for key in job.config)
    differ = [key for key in keys if len({repr(job.config.get(key)) for job in jobs if job.config}) > 1]
    return [key for key in differ if key not in IGNORED_KEYS]


def rows_of(job: Job, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the table rows of a job: one for a run, one for each strategy of a plan; sizes in bytes."""
    first = {"job": job.folder.name, **{key: job.config.get(key) for key in keys}}
    status = {"status": job.status, "seconds": job.result.get("seconds")}
    plan, memory, privacy, metrics = (_mapping(job.result, name) for name in ("plan", "memory", "privacy", "metrics"))
    rows = [row for row in plan.get("rows") or () if isinstance(row, Mapping)]
    vary = plan.get("vary")
    if rows and job.config.get("mode") == "plan":
        for row in rows:
            yield {
                **first,
                "strategy": row.get("strategy", row.get("way")),
                **(
                    {f"largest {vary}": _largest(row), "size": row.get("size"), "limit": row.get("limit")}
                    if vary
                    else {}
                ),
                "each step": plan.get("fixed"),
                "fits": row.get("fits"),
                **{key: row.get(key) for key in ("exact_bytes", "calibrated_bytes", "reserve_bytes")},
                "smallest_budget_bytes": row.get("smallest_budget_bytes"),
                **({"budget_bytes": plan.get("budget_bytes")} if "budget" in first else {}),
                **status,
            }
        return
    planned = rows[0] if rows else {}
    yield {
        **first,
        **({f"trained at ({vary})": planned.get("described")} if vary else {}),
        **({"predicted_bytes": planned.get("exact_bytes")} if planned else {}),
        "peak_bytes": memory.get("peak_bytes"),
        "allocator_peak_bytes": memory.get("allocator_peak_bytes"),
        **({"epsilon": privacy["epsilon"]} if "epsilon" in privacy else {}),
        **{name: value for name, value in metrics.items() if not name.endswith("_before")},
        **status,
    }


def _mapping(result: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A mapping in a result; empty if it is missing or of another type."""
    found = result.get(name)
    return found if isinstance(found, Mapping) else {}


def _largest(row: Mapping[str, Any]) -> str | None:
    """The largest size in a plan's row, in words."""
    return f"at least {row['described']}" if row.get("timed_out") else row.get("described")


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of all rows, with `status` and `seconds` last."""
    names = dict.fromkeys(key for row in rows for key in row)
    last = [name for name in ("status", "seconds") if name in names]
    return [*(name for name in names if name not in last), *last]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown table, without empty columns."""
    names = [
        name for name in columns_of(rows) if any(row.get(name) is not None for row in rows) and name not in CSV_ONLY
    ]
    heads = [name.removesuffix("_bytes").replace("_", " ") for name in names]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += ["| " + " | ".join(_cell(name, row.get(name)) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_bytes") and isinstance(value, int):
        return format_bytes(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
