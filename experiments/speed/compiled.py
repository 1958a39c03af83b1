"""A training step of the U-Net with compiled branches (`trainer.compile=true`) beside the step itself, in turn.

    python -m experiments.speed.compiled

Float32, one volume of 48^3, forward and backward, no optimizer. Compilation is not in the times, but beside them.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.record import insert, keep, machine, median, without_options
from memsave.models import MBConv3d, ReversibleUNet3d
from memsave.training.compiled import compile_blocks

HERE = Path(__file__).parent
MODES = ("stored", "checkpoint", "reversible")
SIZE, REPEATS = 48, 7


def main() -> None:
    rows = {mode: measure(mode) for mode in MODES}
    text = table(rows)
    print(text)
    insert(HERE / "README.md", name="compiled", text=text)
    keep(HERE / "compiled.json", command="python -m experiments.speed.compiled", results=rows)


def measure(mode: str) -> dict[str, Any]:
    """Seconds of both steps, of the compilation, and the relative error of the gradients."""
    x = torch.randn(1, 4, SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    plain, compiled = network(mode), network(mode)
    compile_blocks(module for module in compiled.modules() if isinstance(module, MBConv3d))
    started = time.perf_counter()
    found = gradients(compiled, x)
    compilation = time.perf_counter() - started
    expected = gradients(plain, x)
    steps = {"plain": partial(gradients, plain, x), "compiled": partial(gradients, compiled, x)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(REPEATS):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    row = {
        **{name: median(taken) for name, taken in seconds.items()},
        "first_step": compilation,
        "gradient_off": float((found - expected).norm() / expected.norm()),
        "rounds": seconds,
    }
    print(mode, row, flush=True)
    return row


def network(mode: str) -> ReversibleUNet3d:
    torch.manual_seed(0)
    return ReversibleUNet3d(channels=(16, 32, 64), blocks=1, memory=mode, engine="hooks")


def gradients(net: nn.Module, x: Tensor) -> Tensor:
    """All parameters' gradients of one step, as one vector."""
    net.zero_grad()
    net(x).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [f"{machine()}:", "", "| memory= | step | compiled | ratio | first step | gradient off |", "|---" * 6 + "|"]
    for mode, row in rows.items():
        lines.append(
            f"| {mode} | {row['plain']:.2f} s | {row['compiled']:.2f} s | {row['compiled'] / row['plain']:.2f}x | "
            f"{row['first_step']:.0f} s | {row['gradient_off']:.0e} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    without_options(__doc__)
    main()
