"""One table and one picture of a sweep.

    python -m memsave.collect multirun/brats_rev/2026-01-31_10-00-00

reads every job's `config.yaml` and `result.json`, whatever became of it, and writes `sweep.md`, `sweep.csv` and
`sweep.png` into the folder. A job is told by the keys in which the jobs differ; one that left no result is named.
A sweep does this by itself when it ends. Exit codes: 0, or 2 where the folder holds no jobs.
"""

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memsave.profiler import format_bytes
from memsave.training.result import flatten, read_config, read_result

NOTHING = "no result"
UNSEEN = ("size", "budget_bytes")  # columns of sweep.csv that repeat others of the table for people
UNTOLD = ("trainer.resume", "data.root")  # keys that tell where a job ran, not what it did


@dataclass(frozen=True)
class Job:
    """One job of a sweep."""

    folder: Path
    config: Mapping[str, Any]
    """By dotted key."""
    result: Mapping[str, Any]
    """`result.json`; empty where it is missing or broken off."""

    @property
    def status(self) -> str:
        """How it ended."""
        return str(self.result.get("status") or NOTHING)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if len(given) != 1 or given[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if given else 2
    folder = Path(given[0]).expanduser()
    if not folder.is_dir() or not read_jobs(folder):
        what = "is one run, not a sweep" if (folder / "config.yaml").exists() else "holds no jobs"
        print(f"memsave: {folder} {what}; name a sweep's folder, multirun/EXPERIMENT/TIME", file=sys.stderr)
        return 2
    collect(folder)
    return 0


def collect(folder: Path) -> list[Job]:
    """Write the table and the picture, print the table, and return the jobs."""
    jobs = read_jobs(folder)
    rows = [row for job in jobs for row in rows_of(job, varied_keys(jobs))]
    text = markdown(rows)
    missing = [str(job.folder) for job in jobs if job.status == NOTHING]
    if missing:
        text += f"\n\nLeft no result: {', '.join(missing)}"
    (folder / "sweep.md").write_text(f"# {folder.name}\n\n{text}\n")
    with (folder / "sweep.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(columns_of(rows)))
        table.writeheader()
        table.writerows(rows)
    try:
        from memsave.sweep_picture import draw

        draw(rows, folder / "sweep.png")
    except ModuleNotFoundError:
        print("memsave: no picture without matplotlib; install it with: pip install matplotlib", file=sys.stderr)
    print(f"{text}\n\nwritten to {folder}: sweep.md, sweep.csv, sweep.png")
    return jobs


def read_jobs(folder: Path) -> list[Job]:
    """The jobs of a sweep's folder, by number."""
    found = [path for path in folder.iterdir() if path.is_dir()]
    jobs = []
    for path in sorted(found, key=lambda path: (not path.name.isdigit(), int(path.name) if path.name.isdigit() else 0)):
        if (path / "config.yaml").exists() or (path / "result.json").exists():
            jobs.append(Job(path, dict(flatten(read_config(path))), read_result(path)))
    return jobs


def varied_keys(jobs: Sequence[Job]) -> list[str]:
    """The config keys in which the jobs differ, `memory.mode` once and not with all that follows from it."""
    keys = dict.fromkeys(key for job in jobs for key in job.config)
    differ = [key for key in keys if len({repr(job.config.get(key)) for job in jobs if job.config}) > 1]
    return [key for key in differ if key not in UNTOLD]


def rows_of(job: Job, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The lines of a job in the table: one for a run, one for each way to train of a plan; sizes in bytes."""
    told = {"job": job.folder.name, **{key: job.config.get(key) for key in keys}}
    status = {"status": job.status, "seconds": job.result.get("seconds")}
    plan, memory, privacy, metrics = (_mapping(job.result, name) for name in ("plan", "memory", "privacy", "metrics"))
    rows = [row for row in plan.get("rows") or () if isinstance(row, Mapping)]
    vary = plan.get("vary")
    if rows and job.config.get("mode") == "plan":
        for row in rows:
            yield {
                **told,
                "way": row.get("way"),
                **(
                    {f"largest {vary}": _largest(row), "size": row.get("size"), "limit": row.get("limit")}
                    if vary
                    else {}
                ),
                "each step": plan.get("fixed"),
                "fits": row.get("fits"),
                **{key: row.get(key) for key in ("exact_bytes", "calibrated_bytes", "reserve_bytes")},
                "smallest_budget_bytes": row.get("smallest_budget_bytes"),
                **({"budget_bytes": plan.get("budget_bytes")} if "budget" in told else {}),
                **status,
            }
        return
    planned = rows[0] if rows else {}
    yield {
        **told,
        **({f"trained at ({vary})": planned.get("described")} if vary else {}),
        **({"predicted_bytes": planned.get("exact_bytes")} if planned else {}),
        "peak_bytes": memory.get("peak_bytes"),
        "allocator_peak_bytes": memory.get("allocator_peak_bytes"),
        **({"epsilon": privacy["epsilon"]} if "epsilon" in privacy else {}),
        **{name: value for name, value in metrics.items() if not name.endswith("_before")},
        **status,
    }


def _mapping(result: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An entry of a result; empty where it is missing or of another kind."""
    found = result.get(name)
    return found if isinstance(found, Mapping) else {}


def _largest(row: Mapping[str, Any]) -> str | None:
    """The largest size of a plan's row in words."""
    return f"at least {row['described']}" if row.get("timed_out") else row.get("described")


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every column of any row, `status` and `seconds` last."""
    names = dict.fromkeys(key for row in rows for key in row)
    last = [name for name in ("status", "seconds") if name in names]
    return [*(name for name in names if name not in last), *last]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for people; empty columns are left out."""
    names = [name for name in columns_of(rows) if any(row.get(name) is not None for row in rows) and name not in UNSEEN]
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
