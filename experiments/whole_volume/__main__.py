"""A training step on a whole BraTS volume: time, live bytes and memory of the process, against the plan.

    python -m experiments.whole_volume            # about five minutes on two cores

Writes the tables of three documents from one run of `experiment=brats_full`.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.record import insert, keep, machine
from memsave.profiler import format_bytes

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DOCUMENTS = (HERE / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "brats.md")
COMMAND = ["-m", "memsave.run", "experiment=brats_full", "budget=8GiB"]
LARGEST = 8


def main() -> None:
    found = run()
    text = table(found)
    print(text)
    for document in DOCUMENTS:
        insert(document, name="whole volume", text=text)
    insert(HERE / "README.md", name="whole volume peak", text=peak_table(found["largest_blocks"]))
    keep(HERE / "results.json", command="python -m experiments.whole_volume", results=found)


def run() -> dict[str, Any]:
    """The kept entries of the run's result."""
    with tempfile.TemporaryDirectory() as folder:
        for more in ([f"hydra.run.dir={folder}/plan", "mode=plan"], [f"hydra.run.dir={folder}"]):  # first calibrate
            environment = {**os.environ, "MEMSAVE_CACHE": f"{folder}/cache"}
            subprocess.run([sys.executable, *COMMAND, *more], check=True, env=environment)
        result = json.loads((Path(folder) / "result.json").read_text())
        report = json.loads((Path(folder) / "memory.json").read_text())["step"]
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    planned = next(row for row in result["plan"]["rows"] if row["strategy"] == result["plan"]["strategy"])
    memory = result["memory"]
    steps = [{"loss": line["loss"], "seconds": line["seconds"]} for line in lines if "loss" in line]
    above = planned["calibrated_bytes"] - memory["peak_by_category"]["parameter"]
    return {
        "run": " ".join(["python", *COMMAND]),
        "steps": steps,
        "predicted": {
            "live_bytes": planned["exact_bytes"],
            "calibrated_bytes": planned["calibrated_bytes"],
            "process_bytes": memory["process_start_bytes"] + above,
        },
        "measured": {
            "live_bytes": memory["peak_bytes"],
            "process_bytes": memory["process_peak_bytes"],
            "process_start_bytes": memory["process_start_bytes"],
        },
        "peak_by_category": memory["peak_by_category"],
        "largest_blocks": report["blocks"][:LARGEST],
    }


def table(found: dict[str, Any]) -> str:
    predicted, measured = found["predicted"], found["measured"]
    seconds = ", ".join(f"{step['seconds']:.0f} s" for step in found["steps"])
    losses = ", ".join(f"{step['loss']:.3f}" for step in found["steps"])
    lines = [f"{machine()}; steps: {seconds}; losses: {losses}:\n"]
    lines += ["| | predicted | measured | off by |", "|---|---|---|---|"]
    for name, key in (("live tensors", "live_bytes"), ("the whole process", "process_bytes")):
        off = predicted[key] / measured[key] - 1
        lines.append(f"| {name} | {format_bytes(predicted[key])} | {format_bytes(measured[key])} | {off:+.1%} |")
    lines.append(f"| the process before the first step | | {format_bytes(measured['process_start_bytes'])} | |")
    return "\n".join(lines)


def peak_table(blocks: list[dict[str, Any]]) -> str:
    lines = ["| bytes | shape | module | category |", "|---|---|---|---|"]
    for block in blocks:
        shape = "x".join(map(str, block["shape"]))
        lines.append(f"| {format_bytes(block['bytes'])} | {shape} | {block['module'] or ''} | {block['category']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
