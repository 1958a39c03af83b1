"""The accuracy of plans: predictions on fake tensors against real steps, and sweeps over budgets.

    python -m experiments.planning

1. Steps of other sizes than the calibration step: exact and calibrated bytes against those of PyTorch's allocator.
2. Steps at the largest size of a plan for a small budget: live bytes, and those of the allocator.
3. The pictures of `experiment=brats_budget` and `experiment=gpt2_budget`.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from experiments.record import insert, keep, machine, without_options
from memsave.config.compose import compose, to_objects
from memsave.config.schema import Config
from memsave.planning.fake_step import fake_step
from memsave.planning.plan import calibration_of, make_plan, variation
from memsave.planning.report import draw
from memsave.profiler import MemoryRecorder, allocator_peak, format_bytes, peak_on_fake
from memsave.progress import Progress
from memsave.tasks.definition import definition_of

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CPU = torch.device("cpu")
BRATS = ["experiment=brats_rev", "trainer.batch_size=1"]
GPT2 = ["experiment=gpt2_dp", "model=gpt2", "trainer.batch_size=8", "trainer.micro_batch_size=8"]
STEPS = [  # other sizes than the calibration: crops of 40, one block per level; texts of 64 tokens, two layers
    *[
        [*BRATS, f"memory={mode}", *size]
        for mode in ("stored", "checkpoint", "reversible")
        for size in (
            ["data.crop_size=[32,32,32]"],
            ["data.crop_size=[48,48,48]"],
            ["data.crop_size=[80,72,64]"],
            ["data.crop_size=[48,48,48]", "model.blocks=[2,2,2]"],
            ["data.crop_size=[48,48,48]", "model.channels=[24,48,96]", "model.expansion=6"],
        )
    ],
    [*BRATS, "memory=reversible", "data.crop_size=[64,64,64]", "trainer.precision=bfloat16"],
    [*GPT2, "privacy=none", "data.max_length=100"],
    [*GPT2, "data.max_length=100"],
    [*GPT2, "memory=checkpoint", "data.max_length=256", "trainer.micro_batch_size=2"],
    ["experiment=gpt2_dp"],
]
BUDGETS = [
    *[(f"{mode}, volume", [*BRATS, f"memory={mode}", "vary=volume", "budget=512MiB"])
      for mode in ("stored", "checkpoint", "reversible")],
    ("reversible, channels", [*BRATS, "memory=reversible", "vary=channels", "budget=512MiB"]),
    ("plain GPT-2, batch", [*GPT2, "privacy=none", "vary=batch", "budget=3GiB"]),
    ("ghost GPT-2, batch", [*GPT2, "vary=batch", "budget=3GiB"]),
    ("ghost small GPT-2, length", ["experiment=gpt2_dp", "vary=length", "budget=256MiB"]),
]  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["MEMSAVE_CACHE"] = cache  # calibrate anew
        measure()


def measure() -> None:
    """Renew the tables and pictures."""
    steps = [compare(overrides) for overrides in STEPS]
    budgets = [stay_inside(name, overrides) for name, overrides in BUDGETS]
    texts = {"planned steps": step_table(steps), "planned budgets": budget_table(budgets)}
    for name, text in texts.items():
        print(text)
        insert(HERE / "README.md", name=name, text=text)
        insert(ROOT / "docs" / "planning.md", name=name, text=text)
    draw(volumes(), HERE / "plan.png")
    for experiment in ("brats_budget", "gpt2_budget"):
        sweep(experiment)
    keep(
        HERE / "results.json",
        command="python -m experiments.planning",
        results={"steps": steps, "budgets": budgets},
    )


def config_of(overrides: list[str]) -> Config:
    return to_objects(compose(overrides))


def measured(config: Config, *, device: torch.device = CPU) -> dict[str, int]:
    """(live bytes, bytes of the allocator) of the second real step."""
    made = fake_step(config, device=device)
    made.run()
    with MemoryRecorder(made.model, optimizer=made.optimizer) as recorder:
        made.run()
    live = recorder.report()
    taken = allocator_peak(made.run, device=device)
    assert taken is not None
    return {"measured_live_bytes": live.peak_bytes, "measured_allocator_bytes": live.start_bytes + taken}


def compare(overrides: list[str], *, device: torch.device = CPU) -> dict[str, Any]:
    """Predicted and measured bytes of one config."""
    config = config_of(overrides)
    calibration = calibration_of(config, definition_of(config).current_strategy(), device, progress=Progress())
    predicted = peak_on_fake(lambda: fake_step(config, device=device))
    row = {
        "overrides": overrides,
        "exact_bytes": predicted.peak_bytes,
        "calibrated_bytes": calibration.allocator_bytes(predicted),
        **measured(config, device=device),
    }
    row["error"] = row["calibrated_bytes"] / row["measured_allocator_bytes"] - 1
    print(overrides, f"{row['error']:+.2%}", flush=True)
    return row


def stay_inside(name: str, overrides: list[str]) -> dict[str, Any]:
    """The size of a plan for a budget, and the measured bytes of a real step at that size."""
    config = config_of([*overrides, "profiler.compare=[]"])
    config = config.changed({"mode": "plan"})
    strategy = definition_of(config).current_strategy()
    answer = make_plan(config, CPU, strategies=[strategy], progress=Progress()).own.answer
    assert answer is not None and answer.size is not None
    varied = variation(config)
    row = {
        "name": name,
        "overrides": overrides,
        "budget_bytes": answer.budget,
        "size": varied.describe(answer.size),
        "exact_bytes": answer.need.exact,
        "calibrated_bytes": answer.need.calibrated,
        **measured(varied.at(answer.size)),
    }
    print(name, row["size"], flush=True)
    return row


def volumes() -> Any:
    """Draw the plan of the first command of the guide."""
    overrides = [*BRATS, "data.crop_size=[240,240,160]", "mode=plan", "vary=volume", "budget=16GiB"]
    return make_plan(config_of(overrides), CPU, progress=Progress())


def sweep(experiment: str) -> None:
    """Run the sweep of an experiment and keep its picture and table."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "memsave.run", f"experiment={experiment}", f"hydra.sweep.dir={folder}/sweep"]
        subprocess.run(command, check=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)})
        for suffix in ("png", "csv"):
            shutil.copy(f"{folder}/sweep/sweep.{suffix}", HERE / f"{experiment}.{suffix}")


def describe(overrides: list[str]) -> str:
    quiet = ("experiment=", "trainer.batch_size=")
    return " ".join(each for each in overrides if not each.startswith(quiet)) or "as it is"


def step_table(rows: list[dict]) -> str:
    worst = max(abs(row["error"]) for row in rows)
    lines = [
        f"{machine()}; largest error {worst:.2%}:\n",
        "| experiment | with | exact | live, measured | calibrated | allocator, measured | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sizes = ("exact_bytes", "measured_live_bytes", "calibrated_bytes", "measured_allocator_bytes")
        cells = [row["overrides"][0].removeprefix("experiment="), describe(row["overrides"])]
        cells += [format_bytes(row[key]) for key in sizes]
        lines.append("| " + " | ".join([*cells, f"{row['error']:+.2%}"]) + " |")
    return "\n".join(lines)


def budget_table(rows: list[dict]) -> str:
    lines = [
        f"{machine()}:\n",
        "| what | budget | largest that fits | predicted | live, measured | allocator, measured |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        sizes = ("calibrated_bytes", "measured_live_bytes", "measured_allocator_bytes")
        cells = [row["name"], format_bytes(row["budget_bytes"]), row["size"]]
        lines.append("| " + " | ".join([*cells, *(format_bytes(row[key]) for key in sizes)]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    without_options(__doc__)
    main()
