"""The backward of a depthwise 3x3x3 convolution on the CPU: memsave's against PyTorch's, measured in turn.

    python -m experiments.speed.depthwise

PyTorch's contiguous layout is what a network gets that asks for nothing; channels_last_3d is its better layout.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.record import insert, keep, machine, median
from memsave.models import depthwise_conv3d

SHAPES = [(1, 96, 64, 64, 64), (1, 48, 128, 128, 128), (2, 32, 48, 48, 48)]
HERE = Path(__file__).parent
LAST = torch.channels_last_3d


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv3d(x, weight, padding=1, groups=x.shape[1])


WAYS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], torch.memory_format]] = {
    "pytorch contiguous": (plain, torch.contiguous_format),
    "pytorch channels_last_3d": (plain, LAST),
    "memsave": (depthwise_conv3d, LAST),
}


def once(shape: tuple[int, ...], way: str) -> tuple[float, float, tuple[Tensor, ...]]:
    """(seconds of forward, seconds of backward, gradients) of one convolution."""
    function, layout = WAYS[way]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(memory_format=layout).requires_grad_()
    weight = torch.randn(shape[1], 1, 3, 3, 3, generator=generator, requires_grad=True)
    upstream = torch.randn(shape, generator=generator).to(memory_format=layout)
    started = time.perf_counter()
    y = function(x, weight)
    between = time.perf_counter()
    gradients = torch.autograd.grad(y, (x, weight), upstream)
    return between - started, time.perf_counter() - between, gradients


def measure(shape: tuple[int, ...], *, repeats: int) -> dict:
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    gradients = {}
    for repeat in range(repeats + 1):  # the first round warms up
        for way in WAYS:
            forward, backward, gradients[way] = once(shape, way)
            if repeat:
                times[way].append((forward, backward))
    reference = gradients["pytorch contiguous"]
    error = max(((a - b).norm() / b.norm()).item() for a, b in zip(gradients["memsave"], reference, strict=True))
    rows = {
        way: {"forward_ms": 1e3 * median([f for f, _ in each]), "backward_ms": 1e3 * median([b for _, b in each])}
        for way, each in times.items()
    }
    ratios = [p[1] / m[1] for p, m in zip(times["pytorch contiguous"], times["memsave"], strict=True)]
    return {
        "ways": rows,
        "backward_speedup_over_contiguous": median(ratios),
        "backward_speedup_worst_round": min(ratios),
        "relative_gradient_difference": error,
    }


def table(results: dict[str, dict]) -> str:
    rows = [
        f"{machine()}; milliseconds, forward / backward:\n",
        f"| shape | {' | '.join(WAYS)} | backward, contiguous / memsave (worst round) | channels_last_3d / memsave |",
    ]
    rows.append("|---" * (len(WAYS) + 3) + "|")
    for shape, result in results.items():
        cells = " | ".join(f"{row['forward_ms']:.0f} / {row['backward_ms']:.0f}" for row in result["ways"].values())
        last = result["ways"]["pytorch channels_last_3d"]["backward_ms"] / result["ways"]["memsave"]["backward_ms"]
        rows.append(
            f"| {shape} | {cells} | {result['backward_speedup_over_contiguous']:.1f}x "
            f"({result['backward_speedup_worst_round']:.1f}x) | {last:.1f}x |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    results = {}
    for shape in SHAPES:
        name = "x".join(map(str, shape))
        results[name] = result = measure(shape, repeats=repeats)
        print(f"{name}: backward {result['backward_speedup_over_contiguous']:.1f} times as fast as contiguous PyTorch")
        for way, row in result["ways"].items():
            print(f"  {way:26s} forward {row['forward_ms']:8.1f} ms   backward {row['backward_ms']:8.1f} ms")
    for document in (HERE / "README.md", HERE.parent.parent / "docs" / "results.md"):
        insert(document, name="depthwise", text=table(results))
    keep(Path(__file__).with_suffix(".json"), command="python -m experiments.speed.depthwise", results=results)


if __name__ == "__main__":
    main()
