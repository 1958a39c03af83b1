"""The accuracy of predicted times, and the time of memory=auto: one thread of the CPU, or the GPU if there is one.

    OMP_NUM_THREADS=1 python -m experiments.planning.times

The rates are calibrated anew by the small step of each mode, and then a step of another size is predicted on fake
tensors and measured. With one thread, times are those of the process, so that other programs do not lengthen them much.
Two further tables show what plans do not search for: anchors, and compiled blocks.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments.planning.__main__ import BRATS, config_of, describe
from experiments.record import insert, keep, machine
from memsave.planning.fake_step import fake_step
from memsave.planning.plan import make_plan
from memsave.planning.search import Search
from memsave.profiler import MemoryRecorder, allocator_peak, format_bytes, parse_bytes
from memsave.profiler.seconds import step_clock
from memsave.progress import Progress
from memsave.tasks.definition import definition_of
from memsave.training.compiled import compile_blocks

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS, FIRST = 3, 1  # measured steps, and those before them; a private run checks its model in the first
HOOKS = ["memory=reversible", "memory.engine=hooks"]
TEXT = ["experiment=gpt2_dp", "trainer.batch_size=64", "trainer.micro_batch_size=32"]
CUT = ["privacy.sampler=truncated_poisson", "privacy.largest_batch=64"]  # the measured step has the expected size
STEPS = [  # other sizes than the calibration: crops of 40; two texts of 64 tokens
    [*BRATS, "memory=stored", "data.crop_size=[48,48,48]"],
    [*BRATS, "memory=stored", "data.crop_size=[64,64,48]"],
    [*BRATS, "memory=stored", "data.crop_size=[48,48,48]", "trainer.precision=bfloat16"],
    [*BRATS, "memory=checkpoint", "data.crop_size=[64,64,48]"],
    [*BRATS, *HOOKS, "data.crop_size=[64,64,48]"],
    [*BRATS, "memory=reversible", "memory.engine=fused", "data.crop_size=[64,64,48]"],
    [*BRATS, "memory=offload", "data.crop_size=[48,48,48]"],
    [*BRATS, *HOOKS, "memory.offload=[activations]", "data.crop_size=[48,48,48]"],
    [*TEXT, "privacy=none"],
    [*TEXT, *CUT],
    [*TEXT, *CUT, "model.width=256", "model.heads=8"],
    [*TEXT, *CUT, "memory=checkpoint"],
    [*TEXT, *CUT, "memory.offload=[activations]"],
    [*TEXT, *CUT, "memory.offload=[optimizer]"],
]
ANCHORS = [
    [*BRATS, *HOOKS, "data.crop_size=[32,32,32]", "model.blocks=[4,4,4]", f"memory.anchor_every={every}"]
    for every in ("null", 2, 1)
]
COMPILED = [
    [*BRATS, *memory, "data.crop_size=[40,40,40]"] for memory in (["memory=stored"], ["memory=checkpoint"], HOOKS)
]
SEARCHES = [
    ["experiment=brats_rev", "memory=auto", "memory.engine=hooks", "budget=400MiB"],
    ["experiment=gpt2_dp", "memory=auto", "budget=300MiB"],
]


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["MEMSAVE_CACHE"] = cache
        results = {
            "steps": [compare(overrides) for overrides in STEPS],
            "searches": [search(overrides) for overrides in SEARCHES],
            "anchors": [compare(overrides) for overrides in ANCHORS],
            "compiled": [compare_compiled(overrides) for overrides in COMPILED],
        }
    texts = {
        "predicted times": step_table(results["steps"]),
        "searches": search_table(results["searches"]),
        "anchors": anchor_table(results["anchors"]),
        "compiled plans": compiled_table(results["compiled"]),
    }
    for name, text in texts.items():
        print(text)
        insert(HERE / "README.md", name=name, text=text)
        insert(ROOT / "docs" / "planning.md", name=name, text=text)
    keep(HERE / "times.json", command="OMP_NUM_THREADS=1 python -m experiments.planning.times", results=results)


def compare(overrides: list[str]) -> dict[str, Any]:
    """Predicted and measured seconds of a step."""
    config = config_of([*overrides, "profiler.compare=[]"])
    strategy = definition_of(config).current_strategy()
    row = make_plan(config, DEVICE, strategies=[strategy], progress=Progress()).own
    assert row.step_seconds is not None
    made = fake_step(config, device=DEVICE)
    found = {
        "overrides": overrides,
        "predicted_bytes": row.need.exact,
        "predicted_seconds": row.step_seconds,
        "measured_seconds": measured(made.run),
    }
    found["error"] = found["predicted_seconds"] / found["measured_seconds"] - 1
    print(overrides, f"{found['error']:+.0%}", flush=True)
    return found


def compare_compiled(overrides: list[str]) -> dict[str, Any]:
    """Bytes of the allocator and seconds of a step, and of the same step with compiled blocks."""
    config = config_of([*overrides, "profiler.compare=[]"])
    found: dict[str, Any] = {"overrides": overrides}
    for name in ("plain", "compiled"):
        made = fake_step(config, device=DEVICE)
        if name == "compiled":
            compile_blocks(definition_of(config).compiled_blocks(made.model))
        found[f"{name}_seconds"] = measured(made.run)
        with MemoryRecorder(made.model, optimizer=made.optimizer) as recorder:
            made.run()
        taken = allocator_peak(made.run, device=DEVICE)
        assert taken is not None
        found[f"{name}_bytes"] = recorder.report().start_bytes + taken
    print(found, flush=True)
    return found


def measured(run: Callable[[], object]) -> float:
    """The time of the fastest step."""
    clock = step_clock(DEVICE)
    taken = []
    for _ in range(FIRST + ROUNDS):
        started = clock()
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)
        taken.append(clock() - started)
    return min(taken[FIRST:])


def search(overrides: list[str]) -> dict[str, Any]:
    """The choice of memory=auto, and the time that it takes; calibrations are cached before."""
    config, clock = config_of(overrides), step_clock(DEVICE)
    for _ in range(2):  # the first one calibrates
        started, wall = clock(), time.perf_counter()
        found = Search(config, DEVICE, parse_bytes(str(config.budget)))
        best = found.fastest()
        seconds, wall = clock() - started, time.perf_counter() - wall
    assert best is not None
    chosen = definition_of(best.config).describe_memory()
    print(overrides, chosen, f"{seconds:.1f} s", flush=True)
    return {
        "overrides": overrides,
        "chosen": chosen,
        "predicted_bytes": best.need.total,
        "predicted_seconds": best.seconds,
        "fake_steps": len(found.trials),
        "search_seconds": seconds,
        "search_wall_seconds": wall,
    }


def step_table(rows: list[dict]) -> str:
    errors = sorted(abs(row["error"]) for row in rows)
    lines = [
        f"{machine()}; errors of the time: half of them at most {errors[len(errors) // 2]:.0%}, all at most "
        f"{errors[-1]:.0%}:\n",
        "| experiment | with | time, predicted | time, measured | error |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["overrides"][0].removeprefix("experiment="), describe(row["overrides"])]
        cells += [f"{row[key]:.2f} s" for key in ("predicted_seconds", "measured_seconds")]
        lines.append("| " + " | ".join([*cells, f"{row['error']:+.0%}"]) + " |")
    return "\n".join(lines)


def anchor_table(rows: list[dict]) -> str:
    lines = [
        f"{machine()}, four blocks a level, hooks:\n",
        "| memory.anchor_every | bytes, predicted | time, predicted | time, measured |",
        "|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["overrides"][-1].rpartition("=")[2], format_bytes(row["predicted_bytes"])]
        cells += [f"{row[key]:.2f} s" for key in ("predicted_seconds", "measured_seconds")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compiled_table(rows: list[dict]) -> str:
    lines = [
        f"{machine()}:\n",
        "| with | allocator | compiled | ratio | time | compiled | ratio |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        cells = [describe(row["overrides"])]
        for unit, shown in (("bytes", format_bytes), ("seconds", lambda seconds: f"{seconds:.2f} s")):
            plain, compiled = row[f"plain_{unit}"], row[f"compiled_{unit}"]
            cells += [shown(plain), shown(compiled), f"{compiled / plain:.2f}x"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def search_table(rows: list[dict]) -> str:
    lines = [
        f"{machine()}:\n",
        "| search | choice | step, predicted | fake steps | time of the search |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [" ".join(row["overrides"]), row["chosen"], f"{row['predicted_seconds']:.2f} s"]
        lines.append("| " + " | ".join([*cells, str(row["fake_steps"]), f"{row['search_seconds']:.1f} s"]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
