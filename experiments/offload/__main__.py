"""Live bytes, host bytes and time of a training step, with activations and optimizer state in a memory-mapped file.

    python -m experiments.offload

Real steps on the CPU: the U-Net of `experiment=brats_rev` at 48^3, and a reversible GPT-2 with ghost clipping. Every
strategy takes the same steps from the same weights, and the updated parameters must be equal bit for bit where only the
place of the tensors differs.
"""

import gc
import time
from pathlib import Path
from typing import Any

import torch

from experiments.record import insert, keep, machine, median, without_options
from memsave.config.compose import compose, to_objects
from memsave.planning.fake_step import fake_step
from memsave.profiler import MemoryRecorder, format_bytes
from memsave.profiler.calibration import create_state

HERE = Path(__file__).parent
TIMED = 3  # steps
MODELS = {
    "U-Net": ["experiment=brats_rev", "trainer.batch_size=1", "profiler.compare=[]"],
    "GPT-2, ghost clipping": [
        *("experiment=gpt2_dp", "model=rev_gpt2", "model.layers=6", "model.width=256", "model.heads=4"),
        *("model.vocabulary=4000", "data.max_length=128", "trainer.batch_size=8", "trainer.micro_batch_size=4"),
        *("privacy.passes=2", "privacy.largest_batch=8", "privacy.sampler=truncated_poisson"),
    ],
}
MODES = ("stored", "checkpoint", "reversible")
OFFLOAD = {"": "[]", "activations": "[activations]", "activations and optimizer": "[activations,optimizer]"}


def measured(overrides: list[str], mode: str, offload: str) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """(bytes and seconds of a step, the parameters after all steps)."""
    config = to_objects(compose([*overrides, f"memory={mode}", f"memory.offload={OFFLOAD[offload]}"]))
    torch.manual_seed(0)
    step = fake_step(config, device=torch.device("cpu"))
    create_state(step.optimizer)
    step.run()
    with MemoryRecorder(step.model, optimizer=step.optimizer) as recorder:
        step.run()
    report, seconds = recorder.report(), []
    for _ in range(TIMED):
        started = time.perf_counter()
        step.run()
        seconds.append(time.perf_counter() - started)
    row = {
        "memory": mode,
        "offload": offload,
        "live_bytes": report.peak_bytes,
        "host_bytes": report.offloaded_bytes,
        "optimizer_bytes": report.peak_by_category["optimizer"],
        "seconds": median(seconds),
    }
    return row, [p.detach().clone() for p in step.model.parameters()]


def rows_of(overrides: list[str]) -> list[dict[str, Any]]:
    rows = []
    for mode in MODES:
        plain: list[torch.Tensor] = []
        for offload in OFFLOAD:
            row, parameters = measured(overrides, mode, offload)
            plain = plain or parameters
            row["equal"] = all(map(torch.equal, plain, parameters))
            rows.append(row)
            print(row, flush=True)
            gc.collect()
    return rows


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| model | memory= | in host memory | live bytes | of stored | host bytes | time | of stored | same bits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in results.items():
        stored = rows[0]
        for row in rows:
            cells = [
                name,
                row["memory"],
                row["offload"] or "nothing",
                format_bytes(row["live_bytes"]),
                f"{row['live_bytes'] / stored['live_bytes']:.2f}x",
                format_bytes(row["host_bytes"]),
                f"{row['seconds']:.2f} s",
                f"{row['seconds'] / stored['seconds']:.2f}x",
                "yes" if row["equal"] else "no",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"{machine()}."])


def main() -> None:
    results = {name: rows_of(overrides) for name, overrides in MODELS.items()}
    keep(HERE / "results.json", command="python -m experiments.offload", results=results)
    for document in (HERE / "README.md", HERE.parents[1] / "docs" / "offload.md"):
        insert(document, name="table", text=table(results))


if __name__ == "__main__":
    without_options(__doc__)
    main()
