"""Mutation testing of the mechanisms: does a test notice a small change of the code?

mutmut and cosmic-ray start a new interpreter for each mutant, which imports torch for ten seconds; `mutant_server.py`
forks one that has imported it. Each mutant runs the tests of its file, until the first failure. A mutant that makes
them hang counts as killed.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.reliability.known import EXPLAINED, TESTS
from experiments.reliability.mutations import Mutant, make, places
from experiments.reliability.traced import SHARED

ROOT = Path(__file__).parents[2]
PACKAGES = ("memsave/privacy", "memsave/reversible", "memsave/ghost")
SECONDS = 60.0
"""The tests of a mutant take at most so long; slower ones are left out."""
NO_TESTS = 5
"""The exit code of pytest if it ran no test."""
ROUND = 4
"""Mutants of each file before the next ones of any file."""


def draw(*, seed: int, count: int) -> list[tuple[str, int]]:
    """So many mutants, as (file, how many of its mutants come before): ROUND of each file, then ROUND more of each."""
    left = {name: len(places((ROOT / name).read_text())) for name in sources()}
    drawn: list[tuple[str, int]] = []
    first = 0
    while len(drawn) < count and any(first < number for number in left.values()):
        drawn += [(name, each) for name in left for each in range(first, min(first + ROUND, left[name]))]
        first += ROUND
    return drawn[:count]


def sources() -> list[str]:
    """The files of the three packages."""
    return [str(path.relative_to(ROOT)) for each in PACKAGES for path in sorted((ROOT / each).rglob("*.py"))]


def mutant_of(name: str, number: int, *, seed: int) -> Mutant:
    """The mutant of this number of a file, in an order that depends on the seed."""
    text = (ROOT / name).read_text()
    found = places(text)
    random.Random(f"{seed} {name}").shuffle(found)
    return make(name, text, found[number])


def tests_of(name: str) -> list[str]:
    """The test files of a source file: those of `known.py`, and the one of the same path."""
    path = Path(name)
    mirrored = Path("tests", *path.parts[1:-1], f"test_{path.name}")
    named = [f"tests/{each}" for start, tests in TESTS.items() if name.startswith(f"memsave/{start}") for each in tests]
    return list(dict.fromkeys([*([str(mirrored)] if (ROOT / mirrored).is_file() else []), *named]))


def part(folder: Path, *, seed: int, trials: int, until: float, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run the tests on up to so many mutants before the time `until`.

    `before`: an earlier result. In files that have not changed since, the mutants that survived and are not explained
    run again, and the next ones after the earlier ones.
    """
    files = _still_valid(before or {}, seed=seed)
    survived = [(name, each) for name, counts in files.items() for each in counts["survived"]]
    jobs = [(name, each["number"]) for name, each in survived if f"{name}: {each['change']}" not in EXPLAINED]
    jobs += [(name, each) for name, each in draw(seed=seed, count=trials) if each >= _count(files, name)]
    with _server(jobs) as run:
        traces = Traces(folder, run)
        for name, number in jobs:
            if time.monotonic() > until:
                break
            if traces.take(name):
                mutant = mutant_of(name, number, seed=seed)
                tests, seconds = traces.tests(mutant)
                code = run(_job(mutant, tests, seconds=30 + 3 * seconds)) if tests else NO_TESTS
                _note(files.setdefault(name, _empty(name)), mutant, number, code=code)
    found: dict[str, Any] = {"files": files, "left_out": traces.failed}
    found["wrong"] = [each for each in _survivors(found) if each[2] not in EXPLAINED]
    return found


class Traces:
    """Which tests execute which lines; a test file is run when it is needed for the first time."""

    def __init__(self, folder: Path, run: Callable[[dict[str, Any]], int]):
        self.run, self.report = run, folder / "trace.json"
        self.files: dict[str, dict[str, Any]] = {}
        """By test file and test, seconds and lines."""
        self.failed: list[str] = []
        """Test files that fail without a mutant."""

    def take(self, name: str) -> bool:
        """Run the test files of a source file without a mutant; False if none passes."""
        for each in tests_of(name):
            if each not in self.files and each not in self.failed:
                traced = [str(ROOT / source) for source in sources()]
                job = {"tests": [each], "seconds": 300, "traced": traced, "report": str(self.report)}
                if code := self.run(job):
                    self.failed.append(each)
                    print(f"{each} fails without a mutant (exit code {code})", flush=True)
                else:
                    self.files[each] = json.loads(self.report.read_text())
        return any(each in self.files for each in tests_of(name))

    def tests(self, mutant: Mutant) -> tuple[list[str], float]:
        """(the tests that execute a mutant, or else those that execute anything of its file; their seconds).

        The fastest come first.
        """
        found = sorted(self._found(mutant, mutant.lines)) or sorted(self._found(mutant, None))
        taken, seconds = [], 0.0
        for each, test in found:
            seconds += each
            if not taken or seconds < SECONDS:
                taken.append(test)
        return taken, min(seconds, SECONDS)

    def _found(self, mutant: Mutant, lines: frozenset[int] | None) -> Iterator[tuple[float, str]]:
        """(seconds, test) of the tests that execute one of the lines, or with None any line of the file."""
        for file in tests_of(mutant.path):
            tests = self.files.get(file, {})
            everywhere = lines is not None and (not lines or _executes(tests.get(SHARED), mutant, lines))
            for test, each in tests.items():
                if test != SHARED and (everywhere or _executes(each, mutant, lines)):
                    yield each["seconds"], test


def _executes(test: dict[str, Any] | None, mutant: Mutant, lines: frozenset[int] | None) -> bool:
    found = (test or {"lines": {}})["lines"].get(str(ROOT / mutant.path), ())
    return bool(found) if lines is None else not lines.isdisjoint(found)


def _still_valid(before: dict[str, Any], *, seed: int) -> dict[str, Any]:
    """The results of the files that are as they were."""
    files = before.get("files", {}) if before.get("seed") == seed else {}
    return {name: each for name, each in files.items() if each.get("digest") == _digest(name)}


def _count(files: dict[str, Any], name: str) -> int:
    return files[name]["mutants"] if name in files else 0


def _empty(name: str) -> dict[str, Any]:
    return {"digest": _digest(name), "mutants": 0, "killed": 0, "survived": []}


def _digest(name: str) -> str:
    """A digest of a file; empty without the file."""
    path = ROOT / name
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""


def _note(counts: dict[str, Any], mutant: Mutant, number: int, *, code: int) -> None:
    killed = code not in (0, NO_TESTS)
    counts["mutants"] = max(counts["mutants"], number + 1)
    counts["killed"] += killed
    change = f"{mutant.before} -> {mutant.after}"
    counts["survived"] = [each for each in counts["survived"] if each["number"] != number]
    if not killed:
        counts["survived"].append({"number": number, "line": mutant.line, "change": change})
    print(f"{'killed' if killed else 'SURVIVED'} ({code}) {mutant.path}:{mutant.line}: {change}", flush=True)


def _job(mutant: Mutant, tests: list[str], *, seconds: float) -> dict[str, Any]:
    module = mutant.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    path = str(ROOT / mutant.path)
    return {"module": module, "path": path, "source": mutant.source, "tests": tests, "seconds": seconds}


@contextmanager
def _server(jobs: list[Any]) -> Iterator[Callable[[dict[str, Any]], int]]:
    """A function from a job to the exit code of pytest; nothing is started if there are no jobs."""
    if not jobs:
        yield lambda job: NO_TESTS
        return
    command = [sys.executable, "-m", "experiments.reliability.mutant_server"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes) as process:
        given, answers = process.stdin, process.stdout
        assert given and answers

        def run(job: dict[str, Any]) -> int:
            given.write(json.dumps(job) + "\n")
            return int(answers.readline())

        yield run
        given.close()


def _survivors(found: dict[str, Any]) -> list[tuple[str, int, str]]:
    """(file, line, name) of the mutants that the tests of their file do not notice."""
    files = sorted(found["files"].items())
    return [(name, each["line"], f"{name}: {each['change']}") for name, counts in files for each in counts["survived"]]


def table(found: dict[str, Any]) -> str:
    """The counts, and the mutants that no test noticed, in Markdown."""
    files = found["files"]
    rows = ["| file | mutants | killed |", "|---|---|---|"]
    rows += [f"| {name} | {each['mutants']} | {each['killed']} |" for name, each in sorted(files.items())]
    total, killed = (sum(each[key] for each in files.values()) for key in ("mutants", "killed"))
    rows.append(f"| **all {len(files)} files** | **{total}** | **{killed}** |")
    shown: dict[str, list[str]] = {}
    for name, line, mutant in _survivors(found):
        shown.setdefault(EXPLAINED.get(mutant, ""), []).append(f"`{mutant.replace(name, f'{name}:{line}', 1)}`")
    unknown = shown.pop("", [])
    if shown:
        rows += ["", "Explained:", ""]
        rows += [f"- {mutant}: {reason}" for reason, mutants in shown.items() for mutant in mutants]
    if unknown:
        rows += ["", "Not noticed by the tests of their file:", "", *[f"- {each}" for each in unknown]]
    if found["left_out"]:
        rows += ["", f"Left out, because tests failed without a mutant: {', '.join(found['left_out'])}."]
    return "\n".join(rows)
