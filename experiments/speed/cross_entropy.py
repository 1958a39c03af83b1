"""The loss of a language-model head without the logits: memsave's against PyTorch's, measured in turn.

    python -m experiments.speed.cross_entropy

Each run computes one loss per token, then the gradients of the hidden states and of the weight for random weights of
the losses, as a batch of examples with a mean per example does. "logits" is `F.linear` and `F.cross_entropy`; "pytorch
chunked" is `F.linear_cross_entropy` of PyTorch 2.13 with its default options. Nothing is clipped.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.record import insert, keep, machine, median
from memsave.ghost import linear_cross_entropy
from memsave.profiler import allocator_peak, format_bytes

IGNORED = -100
SIZES = [  # tokens, width, vocabulary, share of ignored targets
    (200, 256, 2048, 0.0),
    (512, 256, 50257, 0.0),
    (1024, 512, 16384, 0.0),
    (512, 768, 50257, 0.0),
    (512, 768, 50257, 0.5),
    (2048, 768, 50257, 0.0),
]
HERE = Path(__file__).parent


def logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets, reduction="none", ignore_index=IGNORED)


def pytorch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, reduction="none", ignore_index=IGNORED, options=options)


def memsave(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(hidden[None], weight, targets[None], ignore_index=IGNORED)[0]


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "logits": logits,
    "pytorch chunked": pytorch,
    "memsave": memsave,
}


def step_of(method: str, size: tuple[int, int, int, float]) -> Callable[[], tuple[Tensor, ...]]:
    """A function that computes losses (N,) and the gradients of hidden (N, d) and weight (V, d)."""
    tokens, width, vocabulary, ignored = size
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = IGNORED
    upstream = torch.rand(tokens, generator=generator)

    def step() -> tuple[Tensor, ...]:
        losses = METHODS[method](hidden, weight, targets)
        return losses.detach(), *torch.autograd.grad(losses, (hidden, weight), upstream)

    return step


def measure(size: tuple[int, int, int, float], *, repeats: int) -> dict:
    steps = {method: step_of(method, size) for method in METHODS}
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    found: dict[str, tuple[Tensor, ...]] = {}
    for repeat in range(repeats + 1):  # the first round warms up
        for method, step in steps.items():
            began = time.perf_counter()
            found[method] = step()
            if repeat:
                seconds[method].append(time.perf_counter() - began)
    errors = {
        method: max(((a - b).norm() / b.norm()).item() for a, b in zip(found[method], found["logits"], strict=True))
        for method in METHODS
    }
    found.clear()
    ours = seconds["memsave"]
    return {
        method: {
            "seconds": median(seconds[method]),
            "time_of_memsave": median([own / other for own, other in zip(ours, seconds[method], strict=True)]),
            "peak_bytes": allocator_peak(steps[method]),
            "relative_error": errors[method],
        }
        for method in METHODS
    }


def table(results: dict[str, dict]) -> str:
    rows = [
        f"{machine()}; seconds, and the allocator's peak above the start:\n",
        f"| tokens x width x vocabulary | {' | '.join(METHODS)} | memsave / pytorch chunked |",
        "|---" * (len(METHODS) + 2) + "|",
    ]
    for size, result in results.items():
        cells = [f"{row['seconds']:.3f} s, {format_bytes(row['peak_bytes'])}" for row in result.values()]
        other = result["pytorch chunked"]
        memory = result["memsave"]["peak_bytes"] / other["peak_bytes"]
        rows.append(f"| {size} | {' | '.join(cells)} | time {other['time_of_memsave']:.2f}x, memory {memory:.2f}x |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    if not hasattr(F, "linear_cross_entropy"):
        parser.error("this PyTorch has no torch.nn.functional.linear_cross_entropy; install 2.13 or newer")
    results = {}
    for size in SIZES:
        tokens, width, vocabulary, ignored = size
        name = f"{tokens} x {width} x {vocabulary}" + (f", {ignored:.0%} ignored" if ignored else "")
        results[name] = measure(size, repeats=repeats)
        for method, row in results[name].items():
            print(f"{name}: {method:16s} {row['seconds']:7.3f} s  {format_bytes(row['peak_bytes']):>12}", flush=True)
    insert(HERE / "README.md", name="cross_entropy", text=table(results))
    keep(Path(__file__).with_suffix(".json"), command="python -m experiments.speed.cross_entropy", results=results)


if __name__ == "__main__":
    main()
