"""Planted breaches of privacy, and what finds each of them.

    python -m experiments.audit
    python -m experiments.audit --quick    # fewer repetitions, and nothing is written

Each breach is planted into a private run several times. The table says how often it was found and by what: by a check
before the run, in its steps, or by the audit at its end. Breaches of the noise and of the clipping norm are also
audited with the checks turned off, to show what the statistics find alone.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from experiments.audit.breaches import BREACHES, HONEST, Breach
from experiments.audit.picture import draw
from experiments.audit.runs import find, one_run, trials
from experiments.record import insert, keep, machine, median

HERE = Path(__file__).parent
REPEATS = {"find": (10, 2), "one run": (10, 2), "trials": (3, 1)}  # (complete, quick)
CANARIES, RUNS = 2000, 300


def main() -> None:
    parser = argparse.ArgumentParser(description="Planted breaches of privacy, and what finds each of them.")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, and nothing is written")
    quick = parser.parse_args().quick
    results = {}
    for breach in (HONEST, *BREACHES):
        row = results[breach.name] = measure(breach, quick=quick)
        print(f"{breach.name}: found {row['found']} of {row['runs']} times", flush=True)
    tables = {"breaches": breaches_table(results), "bounds": bounds_table(results)}
    print("\n\n".join(tables.values()))
    if quick:
        return
    for name, table in tables.items():
        insert(HERE / "README.md", name=name, text=f"{machine()}:\n\n{table}")
    draw(results, HERE / "bounds.png")
    keep(HERE / "results.json", command="python -m experiments.audit", results=results)


def measure(breach: Breach, *, quick: bool) -> dict[str, Any]:
    """How often the breach was found, by what, and the bounds of the audits."""
    repeats = {name: counts[quick] for name, counts in REPEATS.items()}
    found = [find(breach) for _ in range(repeats["find"])]
    by = Counter(each.by for each in found if each)
    row: dict[str, Any] = {"runs": len(found), "found": sum(by.values()), "by": dict(by)}
    row["sentences"] = sorted({each.sentence for each in found if each})[:1]
    kinds = ("one run", "trials") if breach.statistics == "both" else (breach.statistics,)
    if "one run" in kinds:
        row["one run"] = [one_run(breach, canaries=CANARIES) for _ in range(repeats["one run"])]
    if "trials" in kinds:
        row["trials"] = [trials(breach, runs=RUNS) for _ in range(repeats["trials"])]
    return row


def breaches_table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| breach | found | by | what it says |", "|---|---|---|---|"]
    for name, row in results.items():
        by = ", ".join(row["by"]) or "nothing"
        if not row["found"] and "trials" in row and name != HONEST.name:
            audits = row["trials"]
            count = f"{sum(each['bound'] > each['promised'] for each in audits)} of {len(audits)}"
            bound = median([each["bound"] for each in audits])
            lines.append(
                f"| {name} | {count} | `python -m memsave.audit` | epsilon is at least {bound:.2f} (median), promised "
                f"{audits[0]['promised']:.2f} |"
            )
            continue
        sentence = row["sentences"][0] if row["sentences"] else ""
        lines.append(f"| {name} | {row['found']} of {row['runs']} | {by} | {sentence} |")
    return "\n".join(lines)


def bounds_table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| run | audit | promised | lower bound: median, smallest, largest | refuted |", "|---|---|---|---|---|"]
    titles = {"one run": f"one run, {CANARIES} canaries", "trials": f"{RUNS} trainings"}
    for name, row in results.items():
        for kind, title in titles.items():
            if kind in row:
                bounds = [each["bound"] for each in row[kind]]
                promised = row[kind][0]["promised"]
                refuted = sum(bound > promised for bound in bounds)
                lines.append(
                    f"| {name} | {title} | {promised:.2f} | {median(bounds):.2f}, {min(bounds):.2f}, {max(bounds):.2f} "
                    f"| {refuted} of {len(bounds)} |"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
