"""Damaged inputs: every command must end with one sentence and an exit code, or with success, and lose nothing.

Each attack damages one file and runs one command on it. Wrong are a traceback, an error that memsave does not know
(`error.txt`), a crash, a hang, an exit code that the command does not document, and a changed file of a run that was
refused. The attacks of `strangers.py` must not run the code that they plant.
"""

import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.reliability.damage import damage_bytes, damage_json, damage_nifti, damage_table, damage_yaml
from experiments.reliability.forks import Command, Ended, isolated, run
from experiments.reliability.kills import PRIVATE, PROGRAMS, Wrong

CANARY = "canary"
"""A file that planted code makes."""
BLOCKED = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@dataclass(frozen=True)
class Fixtures:
    """Runs and data that the attacks copy."""

    unet: Path
    language: Path
    volumes: Path
    cache: Path
    table: dict[str, bytes]
    """A table of texts by suffix."""


@dataclass
class Attack:
    """One command on one damaged input."""

    command: Command
    what: str
    codes: tuple[int, ...] = (0, 2)
    keeps: Path | None = None
    """Files below this folder must be unchanged unless the command succeeds."""
    canary: Path | None = None


Maker = Callable[[random.Random, Path, Fixtures], Attack]
ATTACKS: dict[str, Maker] = {}


def attack(name: str) -> Callable[[Maker], Maker]:
    """Register a function that prepares an attack in an empty folder."""

    def register(make: Maker) -> Maker:
        ATTACKS[name] = make
        return make

    return register


def fixtures(folder: Path) -> Fixtures:
    """Train the runs that the attacks copy."""
    cache = folder / "cache"
    places = {"unet": PROGRAMS["U-Net"], "language": [*PRIVATE, "privacy.seed=1"]}
    for name, overrides in places.items():
        arguments = [*overrides, f"hydra.run.dir={folder / name}", "trainer.checkpoint_every=1"]
        ended = run(Command(arguments, folder, variables={"MEMSAVE_CACHE": str(cache)}))
        if ended.code:
            raise Wrong(f"the fixture {name} ended with {ended.code}: {ended.err}")
    (volumes,) = cache.glob("phantom-*")
    rows = [{"prompt": f"name: {n} | food: soup", "completion": f"{n} serves soup."} for n in ("Ann", "Bo", "Cy") * 4]
    jsonl = "".join(json.dumps({**row, "number": number}) + "\n" for number, row in enumerate(rows))
    csv = "prompt,completion\r\n" + "".join(f"{row['prompt']},{row['completion']}\r\n" for row in rows)
    return Fixtures(
        folder / "unet", folder / "language", volumes, cache, {".jsonl": jsonl.encode(), ".csv": csv.encode()}
    )


def _command(place: Path, module: str, *arguments: Any, fixtures: Fixtures) -> Command:
    variables = {"MEMSAVE_CACHE": str(place / "cache"), **BLOCKED}
    shutil.copytree(fixtures.cache, place / "cache", ignore=shutil.ignore_patterns("ledger"))
    return Command(list(map(str, arguments)), place, module=module, variables=variables, seconds=60)


def _killed(source: Path, place: Path) -> Path:
    """A copy of a run that looks as if it had been killed after its last but one checkpoint."""
    folder = place / "run"
    shutil.copytree(source, folder)
    shutil.rmtree(folder / "checkpoint")
    shutil.rmtree(folder / "model")
    (folder / "result.json").unlink()
    (folder / "checkpoint.previous").rename(folder / "checkpoint")
    return folder


def _damage(path: Path, rng: random.Random, *, canary: Path) -> None:
    content = path.read_bytes()
    if path.suffix == ".json":
        changed = damage_json(content, rng)
    elif path.suffix == ".yaml":
        changed = damage_yaml(content, rng, canary=canary)
    else:
        changed = damage_bytes(content, rng)
    path.write_bytes(changed)


def _volumes(rng: random.Random, place: Path, found: Fixtures) -> tuple[Path, str]:
    root = place / "volumes"
    shutil.copytree(found.volumes, root)
    path = rng.choice(sorted(root.rglob("*.nii.gz")))
    path.write_bytes(damage_nifti(path.read_bytes(), rng))
    return root, path.name


@attack("check of volumes")
def _check_volumes(rng: random.Random, place: Path, found: Fixtures) -> Attack:
    root, name = _volumes(rng, place, found)
    return Attack(_command(place, "memsave.data.check", f"root={root}", fixtures=found), name)


@attack("training on volumes")
def _train_volumes(rng: random.Random, place: Path, found: Fixtures) -> Attack:
    root, name = _volumes(rng, place, found)
    own = [each for each in PROGRAMS["U-Net"] if not each.startswith(("data.cases", "data.size", "trainer.ev"))]
    arguments = [*own, "data=brats", f"data.root={root}", "trainer.steps=1", "hydra.run.dir=out"]
    return Attack(_command(place, "memsave.run", *arguments, fixtures=found), name)


@attack("prediction of volumes")
def _predict_volumes(rng: random.Random, place: Path, found: Fixtures) -> Attack:
    root, name = _volumes(rng, place, found)
    arguments = [f"checkpoint={found.unet}", f"input={root}", "output=out"]
    return Attack(_command(place, "memsave.predict", *arguments, fixtures=found), name, codes=(0, 1, 2))


def _table(rng: random.Random, place: Path, found: Fixtures) -> Path:
    suffix = rng.choice(sorted(found.table))
    path = place / f"texts{suffix}"
    path.write_bytes(damage_table(found.table[suffix], rng))
    return path


@attack("check of texts")
def _check_texts(rng: random.Random, place: Path, found: Fixtures) -> Attack:
    path = _table(rng, place, found)
    arguments = ["data=records", f"root={path}"]
    return Attack(_command(place, "memsave.data.check", *arguments, fixtures=found), path.name)


@attack("training on texts")
def _train_texts(rng: random.Random, place: Path, found: Fixtures) -> Attack:
    path = _table(rng, place, found)
    own = [each for each in PRIVATE if not each.startswith(("data.records", "data.held_out"))]
    arguments = [*own, "data=records", f"data.root={path}", "trainer.steps=1", "trainer.batch_size=2"]
    return Attack(_command(place, "memsave.run", *arguments, "hydra.run.dir=out", fixtures=found), path.name)


@attack("generation from texts")
def _generate_texts(rng: random.Random, place: Path, found: Fixtures) -> Attack:
    path = _table(rng, place, found)
    arguments = [f"model={found.language}", f"input={path}", "output=out.jsonl"]
    command = _command(place, "memsave.generate", *arguments, fixtures=found)
    return Attack(command, path.name, codes=(0, 1, 2))


@attack("overrides")
def _overrides(rng: random.Random, place: Path, found: Fixtures) -> Attack:
    from omegaconf import OmegaConf

    from memsave.config.compose import compose
    from memsave.training.result import flatten

    program = rng.choice(["U-Net", "private GPT-2"])
    key = rng.choice(isolated(lambda: sorted(dict(flatten(OmegaConf.to_container(compose(PROGRAMS[program])))))))
    values = (
        "-1", "0", "nan", "inf", "-inf", "1e400", "null", "[]", "{}", "[1,2]", "{a:1}", "true", "abc", "''", "é",
        "1;2", "'${oc.env:HOME}'", "'${nothing}'", "1.5", "-0.0", "1e-320", "[nan]", "'\\\\'", "0x10", "1_0",
        "'a\x00b'", "[[[[1]]]]", "'" + "9" * 5000 + "'", "'٣'", "[-1,-1,-1]", "'../..'", "10" * 20 + "=",
    )  # fmt: skip
    given = f"{rng.choice(('', '', '', '+', '++', '~'))}{key}={rng.choice(values)}"
    arguments = [*PROGRAMS[program], "trainer.steps=1", "hydra.run.dir=out", given]
    command = _command(place, "memsave.run", *arguments, fixtures=found)
    return Attack(command, f"{program} {given[:80]}", codes=(0, 1, 2, 3))  # 3: over budget


@attack("checkpoints")
def _checkpoints(rng: random.Random, place: Path, found: Fixtures) -> Attack:
    folder = _killed(rng.choice((found.unet, found.language)), place)
    names = ("checkpoint/model.safetensors", "checkpoint/optimizer.safetensors", "checkpoint/state.json", "config.yaml")
    weights = (3, 3, 4, 3)
    name = rng.choices([*names, "metrics.jsonl"], [*weights, 1])[0]
    canary = place / CANARY
    _damage(folder / name, rng, canary=canary)
    command = _command(place, "memsave.run", f"trainer.resume={folder}", fixtures=found)
    return Attack(command, f"{folder.name}/{name}", codes=(0, 1, 2), keeps=folder, canary=canary)


@attack("models of volumes")
def _unet_models(rng: random.Random, place: Path, found: Fixtures) -> Attack:
    folder = place / "model"
    shutil.copytree(found.unet / "model", folder)
    name = rng.choice(("config.json", "config.json", "model.safetensors"))
    _damage(folder / name, rng, canary=place / CANARY)
    arguments = [f"checkpoint={folder}", f"input={found.volumes}", "output=out"]
    command = _command(place, "memsave.predict", *arguments, fixtures=found)
    return Attack(command, name, codes=(0, 1, 2), keeps=folder)


@attack("models of texts")
def _language_models(rng: random.Random, place: Path, found: Fixtures) -> Attack:
    folder, (path, read) = place / "model", (place / "in.jsonl", found.table[".jsonl"])
    path.write_bytes(read)
    shutil.copytree(found.language / "model", folder)
    name = rng.choice([each.name for each in sorted(folder.iterdir())])
    _damage(folder / name, rng, canary=place / CANARY)
    arguments: list[Any] = [f"model={folder}", f"input={path}", "output=out.jsonl"]
    module = "memsave.generate"
    if rng.random() < 0.3:
        arguments = [*PRIVATE[:1], "model=gpt2", f"model.name={folder}", *PRIVATE[9:], "hydra.run.dir=out"]
        arguments = [each for each in arguments if not str(each).startswith("model.batch")]
        module = "memsave.run"
    command = _command(place, module, *arguments, fixtures=found)
    return Attack(command, f"{module} {name}", codes=(0, 1, 2), keeps=folder)


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "result.json"  # every attempt writes one
    }


def try_attack(name: str, *, seed: int, place: Path, found: Fixtures) -> tuple[str, int | None, str | None]:
    """(what was attacked, exit code, what was wrong)."""
    place.mkdir(parents=True)
    given = ATTACKS[name](random.Random(seed), place, found)
    before = None if given.keeps is None else _digests(given.keeps)
    ended = run(given.command)
    wrong = _judge(given, ended, before=before)
    return given.what, ended.code, wrong


def _judge(given: Attack, ended: Ended, *, before: dict[str, str] | None) -> str | None:
    said = [line for line in ended.err.splitlines() if line.startswith("memsave: ")]
    if given.canary is not None and given.canary.exists():
        return "planted code ran"
    if ended.hung:
        return "it hung"
    if "Traceback" in ended.err or "error.txt" in ended.err or ended.code < 0:
        return f"exit code {ended.code}: {ended.err.strip()[-1500:]}"
    if ended.code not in given.codes:
        return f"the exit code is {ended.code}: {ended.err.strip()[-600:]}"
    if ended.code and len(said) != 1 and not (ended.out.strip() or "failed" in ended.err or "left out" in ended.err):
        return f"exit code {ended.code} with {len(said)} sentences: {ended.err.strip()[-600:]}"
    if ended.code and before is not None and given.keeps is not None and _digests(given.keeps) != before:
        after = _digests(given.keeps)
        changed = [key for key in {*before, *after} if before.get(key) != after.get(key)]
        return f"exit code {ended.code}, but {sorted(changed)} changed: {ended.err.strip()[-300:]}"
    return None


def part(folder: Path, *, seed: int, trials: int, until: float) -> dict[str, Any]:
    """Run up to so many attacks before the time `until`; returns the counts by kind and what was wrong."""
    from experiments.reliability import strangers

    found = fixtures(folder / "fixtures")
    result: dict[str, Any] = {"kinds": {}, "wrong": []}
    planned = [*strangers.PLANTED, *(list(ATTACKS) * trials)][:trials]
    for number, name in enumerate(planned):
        if time.monotonic() > until:
            break
        place = folder / f"attack-{number}"
        if name in strangers.PLANTED:
            kind, (what, code, wrong) = "strangers' code", strangers.try_code(name, place=place, found=found)
        else:
            kind = name
            what, code, wrong = try_attack(name, seed=hash_of(seed, number), place=place, found=found)
        counts = result["kinds"].setdefault(kind, {"attacks": 0, "refused": 0, "succeeded": 0})
        counts["attacks"] += 1
        counts["succeeded" if code == 0 else "refused"] += 1
        print(f"{number + 1}: {name}: {what}: {'ok' if wrong is None else f'WRONG {wrong}'} ({code})", flush=True)
        if wrong:
            result["wrong"].append({"attack": name, "number": number, "what": what, "found": wrong[-600:]})
        shutil.rmtree(place, ignore_errors=True)
    return result


def hash_of(seed: int, number: int) -> int:
    """The seed of an attack."""
    return random.Random(f"{seed} {number}").randrange(2**32)


def table(found: dict[str, Any]) -> str:
    """The counts in Markdown."""
    rows = ["| input | attacks | ended with a sentence | succeeded |", "|---|---|---|---|"]
    counts = found["kinds"]
    rows += [
        f"| {kind} | {each['attacks']} | {each['refused']} | {each['succeeded']} |" for kind, each in counts.items()
    ]
    sums = [sum(each[key] for each in counts.values()) for key in ("attacks", "refused", "succeeded")]
    rows.append(f"| **all** | {' | '.join(f'**{each}**' for each in sums)} |")
    rows.append(f"\nAttacks that ended in another way: {len(found['wrong'])}.")
    return "\n".join(rows)
