"""Kills of small runs at random moments, and what is left after the run was continued.

A trial starts a run and ends it by a fault, continues it, perhaps with another fault, and at last continues it to its
end. The result must be that of a run without faults: the same weights, optimizer and generators bit for bit, the same
steps, losses and epsilon, and one entry in the ledger that counts each step once.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.reliability.forks import Command, Ended, isolated, run
from experiments.reliability.moments import Moment, free, small_disk

LENGTH = ["trainer.steps=5", "trainer.checkpoint_every=2", "profiler.compare=[]"]
PRIVATE = [
    "experiment=gpt2_dp", "model.layers=2", "model.heads=2", "model.width=16", "model.vocabulary=400",
    "model.positions=200", "model.records=40", "model.steps=2", "model.batch_size=4", "data.records=40",
    "data.held_out=4", "data.max_length=60", "task.generate=1", "task.beams=1", "trainer.batch_size=8",
    "trainer.micro_batch_size=5", "privacy.accountant=rdp", "privacy.noise_multiplier=1.0", *LENGTH,
]  # fmt: skip
SECRET = "private GPT-2 (secret seed)"
PROGRAMS = {
    "private GPT-2": [*PRIVATE, "privacy.seed=1"],
    "private GPT-2 (banded noise)": [
        *PRIVATE, "privacy.seed=1", "privacy.noise=banded", "privacy.sampler=cyclic_poisson", "privacy.bands=3",
    ],
    SECRET: PRIVATE,
    "U-Net": [
        "experiment=brats_rev", "data.cases=4", "data.size=[32,32,24]", "data.crop_size=[16,16,16]",
        "model.channels=[8,16]", "model.blocks=[1,1]", "model.expansion=2", "model.dropout=0.2", "memory.chunks=2",
        "trainer.evaluate_every=2", "trainer.ema=0.5", *LENGTH,
    ],
}  # fmt: skip
FAULTS = ("SIGKILL at a random time", "SIGKILL at a file operation", "power cut", "full disk", "limit of a file's size")
VARYING = ("run", "folder", "date")
"""Entries of the ledger that differ from run to run."""
RANDOM = ("weights", "optimizer", "released", "scores", "statement")
"""Parts of an outcome that depend on a secret seed."""


@dataclass(frozen=True)
class Baseline:
    """A run without faults."""

    outcome: dict[str, Any]
    seconds: float
    operations: int
    bytes: int
    largest: int
    """Bytes of the largest file."""
    cache: Path
    """A cache with the data and the small model, and without a ledger."""


@dataclass
class Trial:
    """One trial: a program and the faults that end it."""

    program: str
    faults: list[str]
    seed: int
    cold: bool
    """The cache is empty: data and model are made again."""
    check_previous: bool
    """Also continue from `checkpoint.previous`, in another folder."""

    def __str__(self) -> str:
        return f"{self.program}, seed {self.seed}: {', '.join(self.faults)}{', cold' if self.cold else ''}"


class Wrong(Exception):
    """A run that did not do what it promises."""


def measure(program: str, folder: Path) -> Baseline:
    """Run the program twice without faults: the first run fills the cache."""
    for name in ("first", "second"):
        count = folder / f"{name}.count"
        if name == "second":
            shutil.rmtree(folder / "cache" / "ledger", ignore_errors=True)
        moment = Moment([folder / name, folder / "cache"], count=count)
        ended = run(_start(program, folder / name, folder / "cache", before=moment.start))
        if ended.code:
            raise Wrong(f"{program} without a fault ended with {ended.code}: {ended.err}")
    outcome = outcome_of(folder / "second", folder / "cache", secret=program == SECRET)
    sizes = [path.stat().st_size for path in (folder / "second").rglob("*") if path.is_file()]
    shutil.rmtree(folder / "cache" / "ledger", ignore_errors=True)
    return Baseline(outcome, ended.seconds, int(count.read_text()), sum(sizes), max(sizes), folder / "cache")


def draw(program: str, number: int, *, seed: int) -> Trial:
    """The trial of this number."""
    rng = random.Random(f"{seed} {program} {number}")
    faults = [FAULTS[number % len(FAULTS)]]
    while len(faults) < 3 and rng.random() < 0.3:
        faults.append(rng.choice(FAULTS[:3]))
    return Trial(program, faults, rng.randrange(2**32), cold=rng.random() < 0.15, check_previous=rng.random() < 0.3)


def part(folder: Path, *, seed: int, trials: int, until: float) -> dict[str, Any]:
    """Run up to so many trials before the time `until`; returns the counts by fault and what was wrong."""
    baselines: dict[str, Baseline] = {}
    found: dict[str, Any] = {"trials": 0, "faults": dict.fromkeys(FAULTS, 0), "programs": {}, "wrong": []}
    for number in range(trials):
        program = list(PROGRAMS)[number % len(PROGRAMS)]
        if time.monotonic() > until:
            break
        if program not in baselines:
            baselines[program] = measure(program, folder / f"baseline-{len(baselines)}")
            found["programs"][program] = {"operations": baselines[program].operations}
        trial = draw(program, number // len(PROGRAMS), seed=seed)
        place = folder / f"trial-{number}"
        wrong = attempt(trial, place, baselines[program])
        print(f"{number + 1}: {trial}: {wrong or 'ok'}", flush=True)
        found["trials"] += 1
        for fault in trial.faults:
            found["faults"][fault] += 1
        if wrong:
            found["wrong"].append({"trial": str(trial), "found": wrong})
        shutil.rmtree(place, ignore_errors=True)
    return found


def table(found: dict[str, Any]) -> str:
    """The counts in Markdown."""
    rows = ["| fault | times |", "|---|---|"]
    rows += [f"| {fault} | {count} |" for fault, count in found["faults"].items()]
    rows.append(f"| **all, in {found['trials']} trials** | **{sum(found['faults'].values())}** |")
    rows.append(f"| trials that lost or changed something | {len(found['wrong'])} |")
    return "\n".join(rows)


def attempt(trial: Trial, folder: Path, baseline: Baseline) -> str | None:
    """None if the trial ended as it must; otherwise what was wrong."""
    try:
        isolated(_attempt, trial, folder, baseline)
    except RuntimeError as error:
        lines = str(error).strip().splitlines()
        return lines[-1] if "Wrong" in lines[-1] else str(error)
    return None


def _attempt(trial: Trial, folder: Path, baseline: Baseline) -> None:
    rng = random.Random(trial.seed)
    disk = folder / "disk"
    place, cache = disk / "run", disk / "cache"
    disk.mkdir(parents=True)
    size = 0
    if not trial.cold:
        size = sum(path.stat().st_size for path in baseline.cache.rglob("*") if path.is_file())
    limited = trial.faults[0] == "full disk" and small_disk(
        disk, size=4096 * 40 + 2 * size + int(rng.uniform(0, 1.4) * baseline.bytes)
    )
    if not trial.cold:
        shutil.copytree(baseline.cache, cache)
    os.environ["MEMSAVE_CACHE"] = str(cache)
    start = _start(trial.program, place, cache)
    for number, fault in enumerate(trial.faults):
        if number and not _has_checkpoint(place):
            break
        command = _resume(place, cache) if number else start
        ended = run(_with_fault(command, fault, rng, baseline, [place, cache]))
        _check_end(ended, fault, place)
        if number == 0 and limited:
            free(disk)
        if trial.program != "U-Net":
            _check_account(place, cut="power cut" in trial.faults[: number + 1])
    if trial.check_previous and trial.program != SECRET:
        _check_previous(place, folder, baseline)
    if not _finished(place):
        if _has_checkpoint(place):
            last = run(_resume(place, cache))
        else:
            place = disk / "again"
            last = run(_start(trial.program, place, cache))
        if last.code:
            raise Wrong(f"the last attempt ended with {last.code}: {last.err.strip()[-600:]}")
    found = outcome_of(place, cache, secret=trial.program == SECRET)
    if place.name == "again":
        _check_lost_run(found, baseline)
    wrong = [key for key, value in baseline.outcome.items() if found[key] != value]
    if wrong:
        key = wrong[0]
        raise Wrong(f"{', '.join(wrong)} differ; {key}: {found[key]} instead of {baseline.outcome[key]}"[:1500])


def _start(program: str, place: Path, cache: Path, **options: Any) -> Command:
    arguments = [*PROGRAMS[program], f"hydra.run.dir={place}"]
    return Command(arguments, place.parent.parent, variables={"MEMSAVE_CACHE": str(cache)}, **options)


def _resume(place: Path, cache: Path, **options: Any) -> Command:
    arguments = [f"trainer.resume={place}"]
    return Command(arguments, place.parent.parent, variables={"MEMSAVE_CACHE": str(cache)}, **options)


def _with_fault(command: Command, fault: str, rng: random.Random, baseline: Baseline, roots: list[Path]) -> Command:
    if fault == "SIGKILL at a random time":
        return replace(command, kill_after=rng.uniform(0.1, 1.0) * baseline.seconds)
    if fault == "limit of a file's size":
        limit = int(rng.uniform(0, 1.1) * baseline.largest)
        return replace(command, before=lambda: _limit(limit))
    if fault == "full disk":
        return command
    number, seed = rng.randint(1, baseline.operations), rng.randrange(2**32)
    moment = Moment(roots, number=number, power=fault == "power cut", seed=seed)
    return replace(command, before=moment.start)


def _limit(size: int) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _check_end(ended: Ended, fault: str, place: Path) -> None:
    """A process that was not killed ends with one sentence and the exit code of a failure, or with success."""
    if ended.hung:
        raise Wrong(f"{fault}: the run hung")
    if ended.killed:
        return
    if "Traceback" in ended.err or (place / "error.txt").exists() or ended.code not in (0, 1, 2):
        raise Wrong(f"{fault}: exit code {ended.code}: {ended.err.strip()[-900:]}")
    said = [line for line in ended.err.splitlines() if line.startswith("memsave: ")]
    if ended.code and len(said) != 1:
        raise Wrong(f"{fault}: exit code {ended.code} with {len(said)} sentences: {ended.err.strip()[-900:]}")


def _check_account(place: Path, *, cut: bool) -> None:
    """The ledger and `memsave.account` count at least the steps that were taken."""
    from memsave.training.ledger import UNREADABLE, read_entries
    from memsave.training.spent_folders import read_spending

    steps = [each["step"] for each in _lines(place) if "lr" in each]
    if not steps:
        return
    root = Path(os.environ["MEMSAVE_CACHE"]) / "ledger"
    entries = [each for data in root.iterdir() for each in read_entries(data.name)] if root.is_dir() else []
    if not any(each.no_guarantee == UNREADABLE or each.steps >= max(steps) for each in entries):
        raise Wrong(f"the ledger counts {[each.steps for each in entries]} of {max(steps)} steps")
    found = read_spending(place)
    if _has_checkpoint(place) and not cut and (found is None or found.steps < max(steps)):
        raise Wrong(f"memsave.account counts {found} of {max(steps)} steps")


def _check_previous(place: Path, folder: Path, baseline: Baseline) -> None:
    previous = place / "checkpoint.previous"
    if not (previous / "state.json").is_file():
        return
    cache = folder / "cache-of-previous"
    shutil.copytree(baseline.cache, cache)
    other = folder / "previous"
    command = Command(
        [f"trainer.resume={previous}", f"hydra.run.dir={other}"], folder, variables={"MEMSAVE_CACHE": str(cache)}
    )
    ended = run(command)
    if ended.code:
        complete = (place / "checkpoint" / "state.json").is_file()  # it was killed while it deleted the previous one
        if not complete or "Traceback" in ended.err:
            raise Wrong(f"checkpoint.previous cannot be continued: {ended.err.strip()[-600:]}")
        return
    found = outcome_of(other, cache)
    for key in ("weights", "optimizer", "released", "step", "private"):
        if found[key] != baseline.outcome[key]:
            raise Wrong(f"continued from checkpoint.previous, {key} differs")


def _check_lost_run(found: dict[str, Any], baseline: Baseline) -> None:
    """A run that ended before its first checkpoint stays in the ledger; remove it from what is compared."""
    lost, found["ledger"] = found["ledger"][:-1], found["ledger"][-1:]
    if len(lost) > 1:
        raise Wrong(f"the ledger lists {len(lost)} lost runs")
    if lost and found["privacy"]:
        others = found["privacy"]["other_runs"]
        if others["count"] != sum(bool(each.get("unfinished", True) or each.get("steps", 1)) for each in lost):
            raise Wrong(f"the ledger lists the lost runs {lost}, and the result {others}")
        found["privacy"] = {**found["privacy"], "other_runs": baseline.outcome["privacy"]["other_runs"]}
        found["statement"] = baseline.outcome["statement"]


def _has_checkpoint(place: Path) -> bool:
    return any((place / name / "state.json").is_file() for name in ("checkpoint", "checkpoint.previous"))


def _finished(place: Path) -> bool:
    try:
        return bool(json.loads((place / "result.json").read_text())["status"] == "ok")
    except (OSError, ValueError, KeyError):
        return False


def outcome_of(place: Path, cache: Path, *, secret: bool = False) -> dict[str, Any]:
    """What a run leaves, without times and names, and without what a secret seed decides.

    The entry of the run itself is the last one of the ledger.
    """
    checkpoint, result = place / "checkpoint", json.loads((place / "result.json").read_text())
    state = json.loads((checkpoint / "state.json").read_text())
    lines = [each for each in _lines(place) if "lr" in each]
    privacy = result["privacy"]
    paths = sorted((cache / "ledger").rglob("*.json"), key=lambda path: (path.stem == state["run"], path))
    entries = [_read(path) for path in paths]
    found = {
        "status": result["status"],
        "step": state["step"],
        "log": [[each["step"], each["loss"], each["lr"]] for each in lines],
        "epsilon": [each.get("epsilon") for each in lines][-1],
        "weights": _digest(checkpoint / "model.safetensors"),
        "optimizer": _digest(checkpoint / "optimizer.safetensors"),
        "released": {str(each.relative_to(place)): _digest(each) for each in sorted((place / "model").rglob("*.*"))},
        "private": state["private"],
        "scores": {key: value for key, value in result["metrics"].items() if key != "loss"},
        "data": result["data"],
        "privacy": privacy and {key: value for key, value in privacy.items() if key != "run"},
        "statement": _digest(place / "privacy.md") if privacy else None,
        "ledger": [{key: value for key, value in each.items() if key not in VARYING} for each in entries],
    }
    if secret:
        found |= dict.fromkeys(RANDOM) | {"log": [each["step"] for each in lines]}
        for key in ("clipped", "examples"):
            del found["private"][key]
        del found["privacy"]["clipped_fraction"]
    return found


def _read(path: Path) -> dict[str, Any]:
    """The content of an entry of the ledger; empty if a power cut damaged it."""
    try:
        return dict(json.loads(path.read_text()))
    except ValueError:
        return {}


def _lines(place: Path) -> list[dict[str, Any]]:
    """The complete lines of the log."""
    path, found = place / "metrics.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [each for each in found if isinstance(each, dict)]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
