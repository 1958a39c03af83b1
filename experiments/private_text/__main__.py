"""Private fine-tuning of language models: the cost of privacy in quality, time and memory.

    python -m experiments.private_text e2e=/my/e2e           # all runs, about 40 minutes on two cores
    python -m experiments.private_text visits-8 visits-none  # only these; the others are kept

Each run is `python -m memsave.run` with the overrides below, in a separate process. The seed of the noise comes from
the operating system, so that scores of private runs vary slightly.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments.record import insert, keep, machine, median
from memsave.profiler import format_bytes
from memsave.training.measure import PLAIN
from memsave.training.statement import round_up

# on two cores: smaller batches than the paper's, and few sentences by beam search
SMOLLM2 = ["trainer.batch_size=64", "task.generate=8", "task.evaluate=64"]
RUNS = {
    "visits-none": ("clinic visits, small GPT-2", ["experiment=gpt2_dp", "privacy=none"]),
    "visits-8": ("clinic visits, small GPT-2", ["experiment=gpt2_dp"]),
    "visits-3": ("clinic visits, small GPT-2", ["experiment=gpt2_dp", "privacy.target_epsilon=3"]),
    "e2e-8": ("E2E, small GPT-2, 10 epochs", ["experiment=gpt2_dp_e2e", "model=small_gpt2"]),
    "smollm2-8": (
        "E2E, SmolLM2-135M, its first 4 steps",
        ["experiment=gpt2_dp_e2e", "model=smollm2", "trainer.epochs=null", "trainer.steps=4", *SMOLLM2],
    ),
}
MEASURED = ["profiler.compare=[stored]", "profiler.compare_seconds=100000"]
HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def main(arguments: list[str]) -> None:
    given = dict(each.split("=", 1) for each in arguments if "=" in each)
    chosen = [each for each in arguments if "=" not in each] or list(RUNS)
    unknown = [*(given.keys() - {"e2e"}), *(set(chosen) - RUNS.keys())]
    if unknown:
        sys.exit(f"{unknown[0]} is not a run; choose from {', '.join(RUNS)}, and give e2e=FOLDER for the E2E challenge")
    if "e2e" not in given and any("gpt2_dp_e2e" in RUNS[name][1][0] for name in chosen):
        sys.exit("give the folder of the E2E challenge's CSV files as e2e=FOLDER")
    path = HERE / "results.json"
    rows: dict[str, Any] = json.loads(path.read_text())["results"] if path.exists() else {}
    for name in chosen:
        overrides = RUNS[name][1]
        root = [f"data.root={given['e2e']}"] if "experiment=gpt2_dp_e2e" in overrides else []
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "memsave.run", *overrides, *root, *MEASURED]
            print(" ".join(["python", *command[1:]]), flush=True)
            subprocess.run([*command, f"hydra.run.dir={folder}"], check=True)
            rows[name] = {"overrides": overrides, "machine": machine(), **read(Path(folder))}
        rows = {each: rows[each] for each in RUNS if each in rows}
        keep(path, command="python -m experiments.private_text e2e=FOLDER", results=rows)
    print(table(rows))
    for document in (HERE / "README.md", ROOT / "docs" / "results.md"):
        insert(document, name="private text", text=table(rows))


def read(folder: Path) -> dict[str, Any]:
    """The kept entries of a run's files."""
    result = json.loads((folder / "result.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line.get("loss") is not None]
    privacy = result["privacy"] or {}
    return {
        "batch_size": OmegaConf.load(folder / "config.yaml").trainer.batch_size,
        "metrics": result["metrics"],
        "losses": [step["loss"] for step in steps],
        "step_seconds": median([step["seconds"] for step in steps[1:]]),  # the recorder slows down the first step
        "seconds": result["seconds"],
        "privacy": {key: value for key, value in privacy.items() if key != "not_private"},
        "memory": result["memory"]["compared"],
    }


def table(rows: dict[str, dict]) -> str:
    lines = [
        "| run | epsilon, delta | steps of examples | perplexity | BLEU | time per step | peak live memory "
        "| over plain |",
        "|" + "---|" * 8,
    ]
    machines = list(dict.fromkeys(row["machine"] for row in rows.values()))
    for name, row in rows.items():
        of = f" ({machines.index(row['machine']) + 1})" if len(machines) > 1 else ""
        scores, privacy, memory = row["metrics"], row["privacy"], row["memory"]
        spent = (
            f"{round_up(privacy['epsilon'], '.2f')}, {round_up(privacy['delta'], '.2e')}" if privacy else "not private"
        )
        peak = memory["stored"]["peak_bytes"]
        over = f"{peak / memory[PLAIN]['peak_bytes']:.2f}x" if PLAIN in memory else ""
        lines.append(
            f"| {RUNS[name][0]}{of} | {spent} | {len(row['losses'])} of {row['batch_size']} "
            f"| {scores['perplexity_before']:.1f} to {scores['perplexity']:.2f} "
            f"| {scores['bleu_before']:.1f} to {scores['bleu']:.1f} "
            f"| {row['step_seconds']:.1f} s | {format_bytes(peak)} | {over} |"
        )
    parts = machines if len(machines) == 1 else [f"({number}) {each}" for number, each in enumerate(machines, 1)]
    return f"{'; '.join(parts)}:\n\n" + "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
