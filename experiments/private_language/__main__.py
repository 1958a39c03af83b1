"""Private classification, dialogs and adapters on generated data: scores with and without privacy.

    python -m experiments.private_language                          # all runs, about half an hour on two cores
    python -m experiments.private_language infilling-8 head-8       # only these; the others are kept

Each run is `python -m memsave.run` with the overrides below, in a separate process; classifiers train with three seeds.
The seed of the noise comes from the operating system, so that scores of private runs vary slightly.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.private_text.__main__ import read
from experiments.record import insert, keep, machine
from memsave.profiler import format_bytes
from memsave.training.measure import PLAIN
from memsave.training.statement import round_up

INFILLING, HEAD = ["experiment=roberta_dp"], ["experiment=roberta_dp", "task.objective=head"]
DIALOG, RECORDS = ["experiment=gpt2_dp_dialog"], ["experiment=gpt2_dp"]
OBJECTIVES = {"infilling": ("comments, infilling", INFILLING), "head": ("comments, a new head", HEAD)}
EPSILONS = {
    "none": ["privacy=none"],
    "8": ["privacy.target_epsilon=8"],
    "3": ["privacy.target_epsilon=3"],
}
RUNS = {
    **{
        f"{name}-{privacy}": (title, [*overrides, *more])
        for name, (title, overrides) in OBJECTIVES.items()
        for privacy, more in EPSILONS.items()
    },
    "dialog-none": ("calls, dialogs", [*DIALOG, "privacy=none"]),
    "dialog-8": ("calls, dialogs", DIALOG),
    "lora-8": ("clinic visits, LoRA", [*RECORDS, "adapter=lora"]),
    "bitfit-8": ("clinic visits, biases alone", [*RECORDS, "adapter=bitfit"]),
}
SCORES = {"accuracy": "accuracy", "mcc": "MCC", "perplexity": "perplexity", "word_f1": "word F1", "bleu": "BLEU"}
SEEDS = 3  # of classifiers
MEASURED = ["profiler.compare=[stored]", "profiler.compare_seconds=100000"]
HERE = Path(__file__).parent


def main(arguments: list[str]) -> None:
    chosen = arguments or list(RUNS)
    unknown = set(chosen) - RUNS.keys()
    if unknown:
        sys.exit(f"{unknown.pop()} is not a run; choose from {', '.join(RUNS)}")
    path = HERE / "results.json"
    rows: dict[str, Any] = json.loads(path.read_text())["results"] if path.exists() else {}
    for name in chosen:
        overrides, seeds = RUNS[name][1], SEEDS if name.startswith(tuple(OBJECTIVES)) else 1
        first = run([*overrides, *MEASURED])
        others = [run([*overrides, f"trainer.seed={seed}", "profiler.compare=[]"]) for seed in range(1, seeds)]
        scores = [row["metrics"] for row in (first, *others)]
        rows[name] = {"overrides": overrides, "machine": machine(), **first, "metrics": scores}
        rows = {each: rows[each] for each in RUNS if each in rows}
        keep(path, command="python -m experiments.private_language", results=rows)
    print(table(rows))
    insert(HERE / "README.md", name="private language", text=table(rows))


def run(overrides: list[str]) -> dict[str, Any]:
    """The kept entries of one run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "memsave.run", *overrides]
        print(" ".join(["python", *command[1:]]), flush=True)
        subprocess.run([*command, f"hydra.run.dir={folder}"], check=True)
        return read(Path(folder))


def table(rows: dict[str, dict]) -> str:
    """The Markdown table of all kept runs."""
    machines = list(dict.fromkeys(row["machine"] for row in rows.values()))
    parts = machines if len(machines) == 1 else [f"({number}) {each}" for number, each in enumerate(machines, 1)]
    lines = [
        "| run | epsilon, delta | scores, before to after | time per step | whole run | peak live memory "
        "| over plain |",
        "|" + "---|" * 7,
    ]
    for name, row in rows.items():
        of = f" ({machines.index(row['machine']) + 1})" if len(machines) > 1 else ""
        privacy, memory = row["privacy"], row["memory"]
        spent = (
            f"{round_up(privacy['epsilon'], '.2f')}, {round_up(privacy['delta'], '.2e')}" if privacy else "not private"
        )
        peak = memory["stored"]["peak_bytes"]
        over = f"{peak / memory[PLAIN]['peak_bytes']:.2f}x" if PLAIN in memory else ""
        lines.append(
            f"| {RUNS[name][0]}{of} | {spent} | {_scores(row['metrics'])} | {row['step_seconds']:.2f} s "
            f"| {row['seconds']:.0f} s | {format_bytes(peak)} | {over} |"
        )
    return f"{'; '.join(parts)}:\n\n" + "\n".join(lines)


def _scores(seeds: list[dict[str, float]]) -> str:
    """Each score before and after training: the mean over the seeds, and the lowest and highest in parentheses."""
    known = {key: name for key, name in SCORES.items() if key in seeds[0]}
    return ", ".join(f"{name} {_score(seeds, f'{key}_before')} to {_score(seeds, key)}" for key, name in known.items())


def _score(seeds: list[dict[str, float]], key: str) -> str:
    values = [metrics[key] for metrics in seeds]
    low, high = min(values), max(values)
    return f"{sum(values) / len(values):.3g}" + (f" ({low:.3g} to {high:.3g})" if high > low else "")


if __name__ == "__main__":
    main(sys.argv[1:])
