"""Mutation testing of the mechanisms: does a test notice a small change of the code?

mutmut and cosmic-ray start a new interpreter for each mutant, which imports torch for ten seconds; `mutant_server.py`
forks one that has imported it. Each mutant runs the tests of its file, until the first failure. A mutant that makes
them hang counts as killed.
"""

import itertools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from experiments.reliability.known import EXPLAINED, LATER, TESTS
from experiments.reliability.mutations import Mutant, make, places

ROOT = Path(__file__).parents[2]
PACKAGES = ("memsave/ghost", "memsave/reversible", "memsave/privacy")
TIMED_OUT, NO_TESTS = -9, 5
PART = 6
"""Mutants of a file that one server runs, after the file as it is."""
SECONDS = 120.0
"""Tests of a mutant that take longer hang."""


def draw(*, seed: int, count: int) -> list[Mutant]:
    """So many mutants: PART of each file that has tests, then PART more of each."""
    rng, files = random.Random(seed), {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if tests_of(name) and name not in LATER:
                found = places(path.read_text())
                rng.shuffle(found)
                files[name] = found
    names = list(files)
    rng.shuffle(names)
    drawn: list[Mutant] = []
    while len(drawn) < count and any(files.values()):
        for name in names:
            chosen, files[name] = files[name][:PART], files[name][PART:]
            drawn += [make(name, (ROOT / name).read_text(), place) for place in chosen]
    return drawn[:count]


def tests_of(name: str) -> list[str]:
    """The test files of a source file: those that `known.py` names, and the one of the same path."""
    path = Path(name)
    mirrored = Path("tests", *path.parts[1:-1], f"test_{path.name}")
    named = [f"tests/{each}" for each in TESTS.get(name.removeprefix("memsave/"), ())]
    return list(dict.fromkeys([*([str(mirrored)] if (ROOT / mirrored).is_file() else []), *named]))


def part(folder: Path, *, seed: int, trials: int, until: float) -> dict[str, Any]:
    """Run the tests on up to so many mutants before the time `until`."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"mutants": 0, "killed": 0, "files": {}}
    found |= {key: [] for key in ("explained", "survived", "wrong", "left_out")}
    for name, group in itertools.groupby(draw(seed=seed, count=trials), key=lambda each: each.path):
        if time.monotonic() > until:
            break
        chosen = list(group)
        jobs = [_job(name, None), *(_job(name, each.source) for each in chosen)]
        (unchanged, _), *answers = _serve(folder, jobs)
        if unchanged:
            found["left_out"].append(name)
            print(f"{', '.join(tests_of(name))} fail without a mutant (exit code {unchanged})", flush=True)
            continue
        for mutant, (code, _) in zip(chosen, answers, strict=True):
            _note(found, mutant, code=code)
    return found


def _note(found: dict[str, Any], mutant: Mutant, *, code: int) -> None:
    counts = found["files"].setdefault(mutant.path, {"mutants": 0, "killed": 0})
    killed = code not in (0, NO_TESTS)
    for each in (found, counts):
        each["mutants"] += 1
        each["killed"] += killed
    said = f"{mutant.path}:{mutant.line}: {mutant.before} -> {mutant.after}"
    print(f"{'killed' if killed else 'SURVIVED'} ({code}) {said}", flush=True)
    if killed:
        return
    reason = EXPLAINED.get(mutant.name)
    if reason is None:
        found["survived"].append(said)
        found["wrong"].append(said)
    else:
        found["explained"].append({"mutant": said, "reason": reason})


def _job(name: str, source: str | None) -> dict[str, Any]:
    module = name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    job = {"module": module, "path": str(ROOT / name), "source": source, "tests": tests_of(name)}
    return {**job, "seconds": SECONDS}


def _serve(folder: Path, jobs: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(exit code of pytest, seconds) of each job."""
    given, answers = folder / "jobs.json", folder / "answers.jsonl"
    given.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "experiments.reliability.mutant_server", str(given), str(answers)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    return [(each["code"], each["seconds"]) for each in map(json.loads, answers.read_text().splitlines())]


def table(found: dict[str, Any]) -> str:
    """The counts, and the mutants that no test noticed, in Markdown."""
    rows = ["| file | mutants | killed |", "|---|---|---|"]
    rows += [f"| {name} | {each['mutants']} | {each['killed']} |" for name, each in sorted(found["files"].items())]
    rows.append(f"| **all** | **{found['mutants']}** | **{found['killed']}** |")
    if found["explained"]:
        rows += ["", "Explained:", ""]
        rows += [f"- `{each['mutant']}`: {each['reason']}" for each in found["explained"]]
    if found["survived"]:
        rows += ["", "Not noticed by the tests of their file:", "", *[f"- `{each}`" for each in found["survived"]]]
    if found["left_out"]:
        rows += ["", f"Left out, because tests failed without a mutant: {', '.join(found['left_out'])}."]
    return "\n".join(rows)
