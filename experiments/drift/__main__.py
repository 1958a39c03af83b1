"""Drift of the recomputed stream, and the training of a network with 128 blocks.

    python -m experiments.drift

The first part measures the drift through 8, 32 and 128 blocks: for branches with and without a final normalisation, in
float32 and bfloat16, and for a stream in bfloat16, as in many implementations. In the second part, 128 blocks with
bfloat16 branches learn to sharpen blurred pictures with the same seed and batches: stored, reversible, and reversible
with anchors; and on a grid, stored and reversible.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.record import insert, keep, machine, without_options
from memsave.reversible import AdditiveCoupling, ReversibleSequence, verify

DEPTHS = (8, 32, 128)
HALF = 8  # channels of a branch
STEPS = 60
ANCHORS = 16
GRID = 2.0**-12  # exact up to 4096
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
low = partial(torch.autocast, "cpu", dtype=torch.bfloat16)


def normalised() -> nn.Module:
    return nn.Sequential(nn.Conv2d(HALF, HALF, 3, padding=1), nn.SiLU(), nn.GroupNorm(2, HALF))


def unnormalised() -> nn.Module:
    conv = nn.Conv2d(HALF, HALF, 3, padding=1)
    nn.init.kaiming_normal_(conv.weight)  # gain 1 behind a ReLU
    return nn.Sequential(conv, nn.ReLU())


def sequence(branch: Callable[[], nn.Module], depth: int, **options: Any) -> ReversibleSequence:
    torch.manual_seed(0)
    return ReversibleSequence((AdditiveCoupling(branch(), branch()) for _ in range(depth)), **options)


def picture(batch: int = 4) -> Tensor:
    return torch.randn(batch, 2 * HALF, 16, 16, generator=torch.Generator().manual_seed(1))


def drift_of(net: ReversibleSequence, context: Callable[[], AbstractContextManager]) -> dict[str, Any]:
    """Errors relative to the stored network: of the first block's recomputed input, of the gradient, and by block."""
    with context():
        report = verify(net, picture(), tolerance=float("inf"))
    (drift,) = report.drift.values()
    return {"input": finite(drift[0]), "gradient": finite(report.gradient), "blocks": list(map(finite, drift))}


def finite(value: float) -> float | None:
    """The value, or None after an overflow, because JSON has no infinity."""
    return value if math.isfinite(value) else None


def drift_by_hand(net: ReversibleSequence) -> dict[str, Any]:
    """The drift of a stream that is rounded to bfloat16 between blocks, without its gradient."""
    net = net.bfloat16()
    states = [picture().bfloat16()]
    with torch.no_grad():
        for block in net.blocks:
            states.append(block(states[-1]))
        x, drift = states[-1], []
        for block, true in zip(reversed(net.blocks), reversed(states[:-1]), strict=True):
            assert isinstance(block, AdditiveCoupling)
            x = block.inverse(x)
            drift.append(((x.double() - true.double()).norm() / true.double().norm()).item())
    return {"input": drift[-1], "blocks": drift[::-1]}


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "normalised, float32": lambda depth: drift_of(sequence(normalised, depth), nullcontext),
    "normalised, bfloat16 branches": lambda depth: drift_of(sequence(normalised, depth), low),
    f"the same, anchor_every={ANCHORS}": lambda depth: drift_of(sequence(normalised, depth, anchor_every=ANCHORS), low),
    "the same, grid=2^-12": lambda depth: drift_of(sequence(normalised, depth, grid=GRID), low),
    "the same, by hand: a bfloat16 stream": lambda depth: drift_by_hand(sequence(normalised, depth)),
    "convolution and ReLU, float32": lambda depth: drift_of(sequence(unnormalised, depth), nullcontext),
    "the same, anchor_every=4": lambda depth: drift_of(sequence(unnormalised, depth, anchor_every=4), nullcontext),
}


MEMORIES: dict[str, dict[str, Any]] = {
    "stored": {"recompute": False},
    "reversible": {},
    f"reversible, anchor_every={ANCHORS}": {"anchor_every": ANCHORS},
    "stored, grid=2^-12": {"recompute": False, "grid": GRID},
    "reversible, grid=2^-12": {"grid": GRID},
}


def train(memory: str) -> dict[str, Any]:
    """Losses of the deep network with bfloat16 branches."""
    net = sequence(normalised, DEPTHS[-1], **MEMORIES[memory])
    stem, head = nn.Conv2d(1, 2 * HALF, 1), nn.Conv2d(2 * HALF, 1, 1)
    model = nn.Sequential(stem, net, nn.GroupNorm(1, 2 * HALF), head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, foreach=False)
    generator, losses = torch.Generator().manual_seed(2), []
    for step in range(STEPS):
        sharp = F.interpolate(torch.randn(8, 1, 4, 4, generator=generator), size=16)
        blurred = F.avg_pool2d(sharp, 5, stride=1, padding=2)
        with low():
            loss = (model(blurred).float() - sharp).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 9:
            print(f"{memory}: step {step + 1} of {STEPS}, loss {losses[-1]:.4f}", flush=True)
    net.recompute = True
    return {"losses": losses, **{f"{key} at the end": drift_of(net, low)[key] for key in ("input", "gradient")}}


def main() -> None:
    drift: dict[str, dict[str, Any]] = {}
    for name, row in ROWS.items():
        drift[name] = {str(depth): row(depth) for depth in DEPTHS}
        print(name, {depth: each["input"] for depth, each in drift[name].items()}, flush=True)
    training = {memory: train(memory) for memory in MEMORIES}
    text = f"{machine()}:\n\n{drift_table(drift)}\n\n{training_table(training)}"
    print(text)
    draw(drift, training)
    for document in (HERE / "README.md", ROOT / "docs" / "reversible.md"):
        insert(document, name="drift", text=text)
    keep(HERE / "results.json", command="python -m experiments.drift", results={"drift": drift, "training": training})


def drift_table(drift: dict[str, dict[str, Any]]) -> str:
    heads = [f"input, {depth} blocks" for depth in DEPTHS] + [f"gradient, {DEPTHS[-1]} blocks"]
    lines = ["| relative error of | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, row in drift.items():
        deepest = row[str(DEPTHS[-1])]
        cells = [shown(row[str(depth)]["input"]) for depth in DEPTHS]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {shown(deepest['gradient']) if 'gradient' in deepest else ''} |"
        )
    return "\n".join(lines)


def shown(error: float | None) -> str:
    return "overflows" if error is None else f"{error:.0e}"


def training_table(training: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"| {DEPTHS[-1]} blocks, bfloat16 branches | first and last loss of {STEPS} steps | gradient off, at the end |",
        "|---|---|---|",
    ]
    for name, row in training.items():
        off = "" if name.startswith("stored") else f"{row['gradient at the end']:.0e}"
        lines.append(f"| {name} | {row['losses'][0]:.4f}, {row['losses'][-1]:.4f} | {off} |")
    return "\n".join(lines)


def draw(drift: dict[str, dict[str, Any]], training: dict[str, dict[str, Any]]) -> None:
    """Draw the drift by block on the left, and the losses on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=160, layout="constrained")
    left, right = figure.subplots(1, 2)
    deep, none = str(DEPTHS[-1]), 1e-9  # zero is drawn at the bottom of the logarithmic axis
    colours = ("#4f81a8", "#e08e45", "#4d9a94", "#2b2f33", "#b9bfc4", "#5b6770", "#f3cf9f")
    for (name, row), colour in zip(drift.items(), colours, strict=True):
        errors = [math.nan if each is None else max(each, none) for each in row[deep]["blocks"]]
        left.semilogy(range(1, DEPTHS[-1] + 1), errors, color=colour, label=name)
    left.invert_xaxis()
    left.set(xlabel="block, rebuilt from the last to the first", ylabel="relative error of its rebuilt input")
    for name, stored, colour in (
        ("reversible", "stored", colours[1]),
        (f"reversible, anchor_every={ANCHORS}", "stored", colours[2]),
        ("reversible, grid=2^-12", "stored, grid=2^-12", colours[3]),
    ):
        pairs = zip(training[name]["losses"], training[stored]["losses"], strict=True)
        right.semilogy(range(1, STEPS + 1), [max(abs(a - b) / b, none) for a, b in pairs], color=colour, label=name)
    right.set(xlabel=f"step of training {deep} blocks, bfloat16 branches", ylabel="difference of its loss from stored")
    for axes, columns in ((left, 2), (right, 1)):
        axes.set_ylim(5e-10, 1e2)
        axes.text(0.99, 0.06, "none", transform=axes.transAxes, fontsize=8, color="#8a9096", ha="right")
        axes.legend(frameon=False, fontsize=8, ncols=columns, loc="lower left", bbox_to_anchor=(0, 1))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "drift.png")


if __name__ == "__main__":
    without_options(__doc__)
    main()
