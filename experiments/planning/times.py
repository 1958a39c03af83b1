"""The accuracy of predicted times, and the time of memory=auto: one thread of the CPU, or the GPU if there is one.

    OMP_NUM_THREADS=1 python -m experiments.planning.times

The rates are calibrated anew by the small step of each mode, and then a step of another size is predicted on fake
tensors and measured. With one thread, times are those of the process, so that other programs do not lengthen them much.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from experiments.planning.__main__ import BRATS, config_of, describe
from experiments.record import insert, keep, machine
from memsave.config.schema import Config
from memsave.planning.fake_step import fake_step
from memsave.planning.plan import make_plan
from memsave.planning.search import Search
from memsave.profiler import parse_bytes
from memsave.profiler.seconds import step_clock
from memsave.progress import Progress
from memsave.tasks.definition import definition_of

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS, FIRST = 2, 1  # measured steps, and those before them; a private run checks its model in the first
SMALL_TEXT = ["experiment=gpt2_dp", "trainer.batch_size=64", "trainer.micro_batch_size=32"]
CUT = ["privacy.sampler=truncated_poisson", "privacy.largest_batch=64"]  # the measured step has the expected size
STEPS = [
    [*BRATS, "memory=stored", "data.crop_size=[48,48,48]"],
    [*BRATS, "memory=reversible", "memory.engine=hooks", "data.crop_size=[48,48,48]"],
    [*SMALL_TEXT, *CUT],
]
SEARCHES = [["experiment=brats_rev", "memory=auto", "memory.engine=hooks", "budget=400MiB"]]


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["MEMSAVE_CACHE"] = cache
        steps = [compare(overrides) for overrides in STEPS]
        searches = [search(overrides) for overrides in SEARCHES]
    for name, text in {"predicted times": step_table(steps), "searches": search_table(searches)}.items():
        print(text)
        insert(HERE / "README.md", name=name, text=text)
        insert(ROOT / "docs" / "planning.md", name=name, text=text)
    keep(
        HERE / "times.json",
        command="OMP_NUM_THREADS=1 python -m experiments.planning.times",
        results={"steps": steps, "searches": searches},
    )


def compare(overrides: list[str]) -> dict[str, Any]:
    """Predicted and measured seconds of a step."""
    config = config_of([*overrides, "profiler.compare=[]"])
    strategy = definition_of(config).current_strategy()
    row = make_plan(config, DEVICE, strategies=[strategy], progress=Progress()).own
    assert row.step_seconds is not None
    found = {"overrides": overrides, "predicted_seconds": row.step_seconds, "measured_seconds": measured(config)}
    found["error"] = found["predicted_seconds"] / found["measured_seconds"] - 1
    print(overrides, f"{found['error']:+.0%}", flush=True)
    return found


def measured(config: Config) -> float:
    """The time of the fastest real step."""
    made, clock = fake_step(config, device=DEVICE), step_clock(DEVICE)
    taken = []
    for _ in range(FIRST + ROUNDS):
        started = clock()
        made.run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)
        taken.append(clock() - started)
    return min(taken[FIRST:])


def search(overrides: list[str]) -> dict[str, Any]:
    """The choice of memory=auto, and the time that it takes; calibrations are cached before."""
    config = config_of(overrides)
    task, clock = definition_of(config), step_clock(DEVICE)
    for _ in range(2):  # the first one calibrates
        started, wall = clock(), time.perf_counter()
        found = Search(config, DEVICE, parse_bytes(str(config.budget)))
        rounds = task.memory_choices(DEVICE)
        choices = [choice for each in rounds for choice in each]
        best = found.by_micro_batch(choices) if task.plans_micro_batch else found.by_parts(rounds)
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
