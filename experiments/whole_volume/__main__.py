"""A training step on a whole BraTS volume: time, live bytes and memory of the process, against the plan.

    python -m experiments.whole_volume            # about five minutes on two cores
    python -m experiments.whole_volume --work     # only the work of a step, and the rates of this machine
    python -m experiments.whole_volume --bfloat16 # only a step under trainer.precision=bfloat16

Writes the tables of three documents from one run of `experiment=brats_full`. The work of a step with and without
recomputation is counted on fake tensors; divided by the rates of a large product and of a copy it gives the time of a
step that only computed its products, or only moved the bytes of its operators.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from experiments.record import earlier, insert, keep, machine
from memsave.config.compose import compose, to_objects
from memsave.planning.fake_step import fake_step
from memsave.profiler import format_bytes, peak_on_fake
from memsave.profiler.work import WorkCounter

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DOCUMENTS = (HERE / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "brats.md")
COMMAND = ["-m", "memsave.run", "experiment=brats_full", "budget=8GiB"]
LARGEST = 8
RESERVED = ("empty", "new_empty")  # these kinds of operators move no bytes
SIDE, BLOCK_BYTES, ROUNDS = 2048, 2**28, 5
STEPS = {"stored": ["memory=stored"], "fused": ["memory=reversible"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--work", action="store_true", help="count the work of a step, and keep what was measured")
    parts.add_argument("--bfloat16", action="store_true", help="run one step in bfloat16, and keep what was measured")
    options = parser.parse_args()
    before = earlier(HERE / "results.json")
    if options.bfloat16:
        if not before:
            parser.error("--bfloat16 adds to what this machine has measured before; first measure without it")
        before["bfloat16"] = run(["trainer.precision=bfloat16", "trainer.steps=1"])
        text = table(before["bfloat16"])
        print(text)
        insert(HERE / "README.md", name="whole volume bfloat16", text=text)
        keep(HERE / "results.json", command="python -m experiments.whole_volume", results=before)
        return
    found = before if options.work else {**before, **run([])}
    found["work"] = {"rates": rates(), "steps": {name: counted(changes) for name, changes in STEPS.items()}}
    if "steps" in found:
        text = table(found)
        print(text)
        for document in DOCUMENTS:
            insert(document, name="whole volume", text=text)
        insert(HERE / "README.md", name="whole volume peak", text=peak_table(found["largest_blocks"]))
    text = work_table(found["work"])
    print(text)
    insert(HERE / "README.md", name="whole volume work", text=text)
    keep(HERE / "results.json", command="python -m experiments.whole_volume", results=found)


def counted(changes: list[str]) -> dict[str, float]:
    """FLOPs and bytes moved of a step, counted on fake tensors."""
    config, work = to_objects(compose(["experiment=brats_full", *changes])), WorkCounter()
    peak_on_fake(lambda: fake_step(config, device=torch.device("cpu"), work=work))
    moving = {kind: each for kind, each in work.total.items() if not kind.startswith(RESERVED)}
    return {"flops": sum(each.flops for each in moving.values()), "bytes": sum(each.bytes for each in moving.values())}


def rates() -> dict[str, float]:
    """FLOPs per second of a large product in float32, and bytes per second that a copy reads and writes."""
    a, b, c = (torch.ones(SIDE, SIDE) for _ in range(3))
    block, other = (torch.ones(BLOCK_BYTES, dtype=torch.uint8) for _ in range(2))
    works = {
        "flops": (lambda: torch.mm(a, b, out=c), 2 * SIDE**3),
        "bytes": (lambda: other.copy_(block), 2 * BLOCK_BYTES),
    }
    best = dict.fromkeys(works, 0.0)
    for _ in range(ROUNDS):
        for name, (call, size) in works.items():
            started = time.perf_counter()
            call()
            best[name] = max(best[name], size / (time.perf_counter() - started))
    return best


def run(changes: list[str]) -> dict[str, Any]:
    """The kept entries of the run's result."""
    command = [*COMMAND, *changes]
    with tempfile.TemporaryDirectory() as folder:
        for more in ([f"hydra.run.dir={folder}/plan", "mode=plan"], [f"hydra.run.dir={folder}"]):  # first calibrate
            environment = {**os.environ, "MEMSAVE_CACHE": f"{folder}/cache"}
            subprocess.run([sys.executable, *command, *more], check=True, env=environment)
        result = json.loads((Path(folder) / "result.json").read_text())
        report = json.loads((Path(folder) / "memory.json").read_text())["step"]
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    planned = next(row for row in result["plan"]["rows"] if row["strategy"] == result["plan"]["strategy"])
    memory = result["memory"]
    steps = [{"loss": line["loss"], "seconds": line["seconds"]} for line in lines if "loss" in line]
    above = planned["calibrated_bytes"] - memory["peak_by_category"]["parameter"]
    return {
        "run": " ".join(["python", *command]),
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


def work_table(work: dict[str, Any]) -> str:
    flops, moved = work["rates"]["flops"], work["rates"]["bytes"]
    lines = [f"{machine()}; a product: {flops / 1e9:.0f} GFLOP/s, a copy: {moved / 1e9:.1f} GB/s:\n"]
    lines += ["| step, counted | FLOPs | at that rate | bytes moved | at that rate |", "|---|---|---|---|---|"]
    for name, step in work["steps"].items():
        times = f"{step['flops'] / 1e9:.0f} G | {step['flops'] / flops:.0f} s | {step['bytes'] / 1e9:.0f} GB"
        lines.append(f"| {name} | {times} | {step['bytes'] / moved:.0f} s |")
    return "\n".join(lines)


def peak_table(blocks: list[dict[str, Any]]) -> str:
    lines = ["| bytes | shape | module | category |", "|---|---|---|---|"]
    for block in blocks:
        shape = "x".join(map(str, block["shape"]))
        lines.append(f"| {format_bytes(block['bytes'])} | {shape} | {block['module'] or ''} | {block['category']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
