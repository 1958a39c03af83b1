"""The loss of a language-model head without the logits: memsave's against PyTorch's, measured in turn.

    python -m experiments.speed.cross_entropy

Each run computes one loss per token, then the gradients of the hidden states and of the weight for random weights of
the losses, as a batch of examples with a mean per example does. "logits" is `F.linear` and `F.cross_entropy`. "pytorch"
is `F.linear_cross_entropy` of PyTorch 2.13 in chunks of 256 tokens. "pytorch, default" lets it choose the chunks; they
have so few tokens that only the smallest size is measured. Nothing is clipped.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
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
    (512, 256, 16384, 0.0),
    (512, 768, 50257, 0.0),
    (512, 768, 50257, 0.5),
    (2048, 256, 50257, 0.0),
]
CHUNK = 256
HERE = Path(__file__).parent


def logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets, reduction="none", ignore_index=IGNORED)


def pytorch(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int | None = CHUNK) -> Tensor:
    options = nn.LinearCrossEntropyOptions() if chunk is None else nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    return F.linear_cross_entropy(hidden, weight, targets, reduction="none", ignore_index=IGNORED, options=options)


def memsave(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(hidden[None], weight, targets[None], ignore_index=IGNORED)[0]


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "logits": logits,
    "pytorch, default": partial(pytorch, chunk=None),
    "pytorch": pytorch,
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
    methods = [method for method in METHODS if method != "pytorch, default" or size == SIZES[0]]
    steps = {method: step_of(method, size) for method in methods}
    found = {method: step() for method, step in steps.items()}  # also warms up
    errors = {
        method: max(((a - b).norm() / b.norm()).item() for a, b in zip(found[method], found["logits"], strict=True))
        for method in methods
    }
    found.clear()
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(repeats):
        for method, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[method].append(time.perf_counter() - began)
    return {
        method: {
            "seconds": median(seconds[method]),
            "time_of_memsave": median([a / b for a, b in zip(seconds["memsave"], seconds[method], strict=True)]),
            "peak_bytes": allocator_peak(steps[method]),
            "relative_error": errors[method],
        }
        for method in methods
    }


def table(results: dict[str, dict]) -> str:
    rows = [
        f"{machine()}; seconds, and the allocator's peak above the start:\n",
        f"| tokens x width x vocabulary | {' | '.join(METHODS)} | memsave / pytorch |",
        "|---" * (len(METHODS) + 2) + "|",
    ]
    for size, result in results.items():
        cells = [_cell(result.get(method)) for method in METHODS]
        other = result["pytorch"]
        memory = result["memsave"]["peak_bytes"] / other["peak_bytes"]
        rows.append(f"| {size} | {' | '.join(cells)} | time {other['time_of_memsave']:.2f}x, memory {memory:.2f}x |")
    return "\n".join(rows)


def _cell(row: dict | None) -> str:
    return "" if row is None else f"{row['seconds']:.2f} s, {format_bytes(row['peak_bytes'])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
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
