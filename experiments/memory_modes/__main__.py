"""Memory, time and losses of stored, checkpoint and reversible.

    python -m experiments.memory_modes

Three copies of the network of `experiment=brats_rev` train with the same batches and seed, one step of each in turn, so
that changes in the machine's speed affect all of them. `MemoryRecorder` counts live bytes in the second step, optimizer
included; times are those of the other steps.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from experiments.record import insert, keep, machine, median, without_options
from memsave.config.compose import compose, to_objects
from memsave.experiment import make_model, make_task
from memsave.models import ReversibleUNet3d
from memsave.profiler import MemoryRecorder, format_bytes, plot_reports
from memsave.training.loop import State, make_state, run_steps

MODES = ("stored", "checkpoint", "reversible")
STEPS = 20
DEPTHS = (1, 2, 4, 8, 16)  # blocks per level, in the encoder and again in the decoder
HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def main() -> None:
    config = to_objects(compose(["experiment=brats_rev", "memory.engine=hooks", f"trainer.steps={STEPS}"]))
    task = make_task(config, torch.device("cpu"))
    runs, recorders, losses, seconds = {}, {}, {m: [] for m in MODES}, {m: [] for m in MODES}
    for mode in MODES:
        torch.manual_seed(config.trainer.seed)
        model, _ = make_model(config)
        model.memory = mode
        recorders[mode] = Recorders(make_state(model, config.trainer))
        runs[mode] = run_steps(recorders[mode].state, task, config.trainer, monitor=recorders[mode])
    for step in range(STEPS):
        for mode in MODES:
            done = next(runs[mode])
            losses[mode].append(done.loss)
            if step >= 2:
                seconds[mode].append(done.seconds)
        print(f"step {step + 1}: " + ", ".join(f"{mode} {losses[mode][-1]:.6f}" for mode in MODES), flush=True)
    reports = {mode: recorders[mode].recorder.report() for mode in MODES}
    results = {
        mode: {
            "peak_bytes": reports[mode].peak_bytes,
            "peak_by_category": reports[mode].peak_by_category,
            "step_seconds": median(seconds[mode]),
            "time_over_stored": median([a / b for a, b in zip(seconds[mode], seconds["stored"])]),
            "largest_relative_loss_difference": max(
                abs(a - b) / abs(b) for a, b in zip(losses[mode], losses["stored"], strict=True)
            ),
            "losses": losses[mode],
        }
        for mode in MODES
    }
    text = table(results)
    print(text)
    depths = measure_depths()
    print(depth_table(depths))
    for document in (HERE / "README.md", ROOT / "docs" / "results.md"):
        insert(document, name="memory modes", text=text)
        insert(document, name="depth", text=depth_table(depths))
    plot_reports(reports, HERE / "memory.png", title="Live memory of one training step")
    keep(
        HERE / "results.json",
        command="python -m experiments.memory_modes",
        results={"twenty steps": results, "depth": depths},
    )


def measure_depths() -> dict[str, dict[str, int]]:
    """Peak live bytes, parameters included, of forward and backward on 1x4x32x32x32 by blocks per level and mode."""
    volume = torch.randn(1, 4, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    peaks: dict[str, dict[str, int]] = {}
    for blocks in DEPTHS:
        model = ReversibleUNet3d(channels=(16, 32, 64), blocks=blocks, engine="hooks")
        peaks[str(blocks)] = {}
        for mode in MODES:
            model.memory = mode
            with MemoryRecorder(model) as recorder:
                model(volume).square().mean().backward()
                model.zero_grad()
            peaks[str(blocks)][mode] = recorder.report().peak_bytes
    return peaks


def depth_table(peaks: dict[str, dict[str, int]]) -> str:
    rows = ["| blocks per level | " + " | ".join(MODES) + " |", "|---" * (len(MODES) + 1) + "|"]
    for blocks, each in peaks.items():
        rows.append(f"| {blocks} | " + " | ".join(format_bytes(each[mode]) for mode in MODES) + " |")
    return "\n".join(rows)


def table(results: dict[str, dict]) -> str:
    rows = [
        f"{machine()}:\n",
        "| memory= | peak live memory | against stored | time per step | losses of 20 steps against stored |",
        "|---|---|---|---|---|",
    ]
    for mode, row in results.items():
        share = row["peak_bytes"] / results["stored"]["peak_bytes"]
        difference = row["largest_relative_loss_difference"]
        rows.append(
            f"| {mode} | {format_bytes(row['peak_bytes'])} | {share:.2f}x | {row['step_seconds']:.2f} s, "
            f"{row['time_over_stored']:.2f}x | {f'within {difference:.0e}' if difference else 'equal'} |"
        )
    return "\n".join(rows)


class Recorders:
    """Records the second step, because the first step has no optimizer state."""

    def __init__(self, state: State):
        self.state = state
        self.recorder = MemoryRecorder(state.model, optimizer=state.optimizer)

    def __call__(self, step: int) -> AbstractContextManager:
        """The context in which step number `step` must run."""
        return self.recorder if step == 2 else nullcontext()


if __name__ == "__main__":
    without_options(__doc__)
    main()
