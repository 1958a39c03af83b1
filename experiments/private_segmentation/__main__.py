"""The cost of privacy for each patient in segmentation, by the number of patients.

    python -m experiments.private_segmentation                      # all runs, about fifteen minutes on two cores
    python -m experiments.private_segmentation 720-8 720-none       # only these; the others are kept
    python -m experiments.private_segmentation noise                # only the accountant, one minute

Each run is `python -m memsave.run experiment=brats_rev_dp` with the overrides below, in a separate process. The seed of
the noise comes from the operating system, so that scores of private runs vary slightly.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.record import insert, keep, machine
from memsave.config.compose import compose, to_objects
from memsave.experiment import make_model
from memsave.privacy import default_delta, noise_multiplier_for
from memsave.profiler import format_bytes
from memsave.training.measure import PLAIN
from memsave.training.statement import round_up

HELD_OUT = 80
PATIENTS = (50, 300, 1000)
EPSILONS = (1, 3, 8)


def of(patients: int, batch_size: int) -> list[str]:
    """Overrides for a number of training patients, in addition to HELD_OUT."""
    cases = patients + HELD_OUT
    fraction = f"data.validation_fraction={HELD_OUT / cases:.6f}"
    return [f"data.cases={cases}", fraction, f"trainer.batch_size={batch_size}"]


RUNS = {
    "720-none": (720, ["privacy=none"]),
    "720-8": (720, []),
    "720-3": (720, ["privacy.target_epsilon=3"]),
    "300-8": (300, of(300, 32)),
    "50-8": (50, of(50, 16)),
    "50-none": (50, [*of(50, 16), "privacy=none"]),
}
HERE = Path(__file__).parent
RESULTS = HERE / "results.json"


def main(chosen: list[str]) -> None:
    unknown = set(chosen) - {*RUNS, "noise"}
    if unknown:
        sys.exit(f"{unknown.pop()} is not a run; choose from {', '.join(RUNS)} and noise")
    for name in chosen or ["noise", *RUNS]:
        found = noise() if name == "noise" else run(RUNS[name][1])
        rows: dict[str, Any] = json.loads(RESULTS.read_text())["results"] if RESULTS.exists() else {}
        rows[name] = found
        rows = {each: rows[each] for each in ("noise", *RUNS) if each in rows}
        keep(RESULTS, command="python -m experiments.private_segmentation", results=rows)
        for document in (HERE / "README.md", HERE.parent.parent / "docs" / "privacy.md"):
            insert(document, name="patients", text=run_table(rows))
            insert(document, name="patients noise", text=noise_table(rows["noise"]))


def run(overrides: list[str]) -> dict[str, Any]:
    """The kept entries of a run's result."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "memsave.run",
            "experiment=brats_rev_dp",
            *overrides,
            "profiler.compare_seconds=100000",
        ]
        print(" ".join(["python", *command[1:]]), flush=True)
        subprocess.run([*command, f"hydra.run.dir={folder}"], check=True)
        result = json.loads((Path(folder) / "result.json").read_text())
    privacy = result["privacy"] or {}
    return {
        "overrides": overrides,
        "machine": machine(),
        "metrics": result["metrics"],
        "privacy": {key: value for key, value in privacy.items() if key != "not_private"},
        "memory": result["memory"]["compared"],
        "seconds": result["seconds"],
    }


def noise() -> dict[str, Any]:
    """Noise multipliers by patients and epsilon, for the steps and the sampling probability of the experiment."""
    config = to_objects(compose(["experiment=brats_rev_dp"]))
    rate = config.trainer.batch_size / RUNS["720-8"][0]
    kwargs = {"sample_rate": rate, "steps": config.trainer.steps, "accountant": "prv"}
    multipliers = {
        str(size): {
            str(epsilon): noise_multiplier_for(target_epsilon=epsilon, delta=default_delta(size), **kwargs)
            for epsilon in EPSILONS
        }
        for size in PATIENTS
    }
    parameters = sum(p.numel() for p in make_model(config)[0].parameters())
    return {**kwargs, "parameters": parameters, "multipliers": multipliers}


def noise_table(found: dict[str, Any]) -> str:
    """Noise multipliers, and the norm of the noise over the largest possible norm of the mean clipped gradient."""
    lines = [
        "| patients | " + " | ".join(f"epsilon {epsilon}" for epsilon in EPSILONS) + " |",
        "|---" * (len(EPSILONS) + 1) + "|",
    ]
    for size, row in found["multipliers"].items():
        over = found["parameters"] ** 0.5 / (found["sample_rate"] * int(size))
        lines.append(
            f"| {size} | " + " | ".join(f"{sigma:.2f}, {sigma * over:.1f} to 1" for sigma in row.values()) + " |"
        )
    return "\n".join(lines)


def run_table(rows: dict[str, Any]) -> str:
    lines = [
        "| patients | epsilon, delta | Dice WT | TC | ET | mean | peak live memory | over plain |",
        "|" + "---|" * 8,
    ]
    machines = []
    for name, (patients, _) in RUNS.items():
        if name not in rows:
            continue
        row = rows[name]
        machines.append(row["machine"])
        scores, privacy, memory = row["metrics"], row["privacy"], row["memory"]
        spent = (
            f"{round_up(privacy['epsilon'], '.2f')}, {round_up(privacy['delta'], '.2e')}" if privacy else "not private"
        )
        dice = " | ".join(f"{scores[each]:.2f}" for each in ("dice_wt", "dice_tc", "dice_et", "dice"))
        peak = memory["reversible"]["peak_bytes"]
        over = f"{peak / memory[PLAIN]['peak_bytes']:.2f}x" if PLAIN in memory else ""
        lines.append(f"| {patients} | {spent} | {dice} | {format_bytes(peak)} | {over} |")
    return "; ".join(dict.fromkeys(machines)) + ":\n\n" + "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
