"""A step of a reversible network in every engine, beside checkpoints and other libraries, measured in turn in one run.

    pip install --no-deps memcnn==1.5.2 revtorch==0.2.4 RevLib==1.7.2        # those that are missing are left out
    python -m experiments.speed.reversible
    python -m experiments.speed.reversible --keep-freed                      # times again where malloc keeps memory

Twice the same network, in float32: a stack of couplings of two MBConv branches, and the U-Net. Forward and backward, no
optimizer. Every library gets the same weights, and MBConv with PyTorch's depthwise convolution and with memsave's.

glibc's malloc returns blocks above 32 MiB to the system, which hands them out again page by page, so that what is
stored costs time for being large. `--keep-freed` takes that out of the comparison, which flatters all who store less.
"""

import argparse
import gc
import importlib.util
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from experiments.record import earlier, have_freed_memory_kept, insert, keep, machine, median
from memsave.models import MBConv3d, ReversibleUNet3d
from memsave.models.mbconv import DepthwiseConv3d
from memsave.profiler import MemoryRecorder, format_bytes
from memsave.profiler.work import WorkCounter
from memsave.reversible import AdditiveCoupling, ReversibleSequence

HERE = Path(__file__).parent
RESULTS = HERE / "reversible.json"
LAST = torch.channels_last_3d
CHANNELS, EXPANSION, DEPTH = 16, 6, 4  # of the stack
CHUNKS = (2, 4, 8)
STORED = "stored"
FAULTS = (RuntimeError, AssertionError, AttributeError, TypeError, ValueError, IndexError)

Blocks = list[AdditiveCoupling]


class Checkpointed(nn.Module):
    """Blocks under a checkpoint each."""

    def __init__(self, blocks: Blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) to the same shape."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def ours(engine: str, *, chunks: int = 1, recompute: bool = True) -> Callable[[Blocks], nn.Module]:
    def make(blocks: Blocks) -> nn.Module:
        for block in blocks:
            for branch in block.children():
                if isinstance(branch, MBConv3d):
                    branch.chunks = min(chunks, branch.depthwise_norm.num_groups)
        return ReversibleSequence(blocks, engine=engine, recompute=recompute)

    return make


def memcnn(blocks: Blocks) -> nn.Module:
    import memcnn as library

    couplings = (library.AdditiveCoupling(Fm=block.f, Gm=block.g) for block in blocks)
    return nn.Sequential(*(library.InvertibleModuleWrapper(each) for each in couplings))


def revtorch(blocks: Blocks) -> nn.Module:
    import revtorch as library

    return library.ReversibleSequence(nn.ModuleList(library.ReversibleBlock(block.f, block.g) for block in blocks))


def revlib(blocks: Blocks) -> nn.Module:
    import revlib as library

    return library.ReversibleSequential(*(branch for block in blocks for branch in (block.f, block.g)))


WAYS: dict[str, tuple[Callable[[Blocks], nn.Module], str | None]] = {
    STORED: (ours("hooks", recompute=False), None),
    "checkpoint": (Checkpointed, None),
    "memsave, hooks": (ours("hooks"), None),
    **{f"memsave, fused, {chunks} chunks": (ours("fused", chunks=chunks), None) for chunks in CHUNKS},
    "MemCNN 1.5.2": (memcnn, "memcnn"),
    "RevTorch 0.2.4": (revtorch, "revtorch"),
    "RevLib 1.7.2": (revlib, "revlib"),
}
SLOW = (STORED, "MemCNN 1.5.2", "RevTorch 0.2.4", "RevLib 1.7.2")  # shown with PyTorch's depthwise, too
PLAIN = ", PyTorch's depthwise"


def stack(make: Callable[[Blocks], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    half, options = CHANNELS // 2, {"expansion": EXPANSION}
    blocks = [AdditiveCoupling(MBConv3d(half, **options), MBConv3d(half, **options)) for _ in range(DEPTH)]
    number(p for block in blocks for p in block.parameters())
    return make(blocks)


def unet(make: Callable[[Blocks], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    net = ReversibleUNet3d(channels=(16, 32, 64), blocks=2)
    number(net.parameters())
    for levels in (net.encoder, net.decoder):
        for place, level in enumerate(levels):
            assert isinstance(level, ReversibleSequence)
            levels[place] = make(list(level.blocks))  # type: ignore[arg-type]
    return net


def number(parameters: Iterable[Any]) -> None:
    """Remember the order of the parameters, which libraries change."""
    for place, parameter in enumerate(parameters):
        parameter.place = place


def with_plain_depthwise(net: nn.Module) -> nn.Module:
    """The network with PyTorch's own depthwise convolutions."""
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, DepthwiseConv3d):
                conv = nn.Conv3d(
                    child.in_channels, child.out_channels, child.kernel_size, padding=child.padding,
                    groups=child.groups, bias=False,
                )  # fmt: skip
                conv.weight = child.weight
                setattr(module, name, conv)
    return net


SUBJECTS: dict[str, tuple[Callable[[Callable[[Blocks], nn.Module]], nn.Module], int]] = {
    "stack": (stack, CHANNELS),
    "U-Net": (unet, 4),
}


def networks(subject: str) -> dict[str, nn.Module]:
    """By way; with the same weights in the same order."""
    build, _ = SUBJECTS[subject]
    found: dict[str, nn.Module] = {}
    for way, (make, needs) in WAYS.items():
        if needs is not None and importlib.util.find_spec(needs) is None:
            continue
        found[way] = build(make)
        if way in SLOW:
            found[way + PLAIN] = with_plain_depthwise(build(make))
    return found


def step(net: nn.Module, x: Tensor) -> None:
    net((x * 1.0).contiguous(memory_format=LAST)).square().mean().backward()


def gradients(net: nn.Module, x: Tensor) -> Tensor:
    """All parameters' gradients as one vector, in float64."""
    step(net, x)
    parameters: list[Any] = sorted(net.parameters(), key=lambda p: p.place)  # type: ignore[attr-defined]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double() for p in parameters])
    net.zero_grad()
    return flat


def live_peak(net: nn.Module, x: Tensor) -> tuple[int, float]:
    """(the most bytes of all but parameters and their gradients, FLOPs of products and convolutions) of a step."""
    work = WorkCounter()
    with MemoryRecorder(net, observe=work) as recorder:
        step(net, x)
    net.zero_grad()
    held = recorder.report().timeline.by_category()
    peak = max(map(sum, zip(*(sizes for name, sizes in held.items() if name not in ("parameter", "gradient")))))
    return peak, sum(each.flops for each in work.total.values())


def measure(subject: str, size: int, *, repeats: int) -> dict[str, dict[str, Any]]:
    channels = SUBJECTS[subject][1]
    x = torch.randn(1, channels, size, size, size, generator=torch.Generator().manual_seed(1)).requires_grad_()
    nets = networks(subject)
    rows: dict[str, dict[str, Any]] = {}
    stored = gradients(nets[STORED], x)
    for way, net in list(nets.items()):
        try:
            off = (gradients(net, x) - stored).norm() / stored.norm()
            peak, flops = live_peak(net, x)
            rows[way] = {"gradient_off": float(off), "peak_bytes": peak, "flops": flops}
        except FAULTS as error:
            rows[way] = {"error": type(error).__name__}
            del nets[way]
    seconds: dict[str, list[float]] = {way: [] for way in nets}
    for _ in range(repeats):
        for way, net in nets.items():
            gc.collect()
            started = time.perf_counter()
            step(net, x)
            seconds[way].append(time.perf_counter() - started)
            net.zero_grad()
    for way, taken in seconds.items():
        rows[way]["seconds"] = median(taken)
        rows[way]["flops_over_stored"] = rows[way]["flops"] / rows[STORED]["flops"]
        rows[way]["time_over_stored"] = median([a / b for a, b in zip(taken, seconds[STORED], strict=True)])
    return rows


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    lines = [f"{machine()}:"]
    for subject, rows in results.items():
        lines += [
            "",
            f"| {subject} | time | over stored | over stored, freed memory kept | FLOPs over stored | live peak "
            "| gradient off by |",
            "|---|---|---|---|---|---|---|",
        ]
        for way, row in rows.items():
            if "error" in row:
                lines.append(f"| {way} | {row['error']} | | | | | |")
                continue
            kept = row.get("kept")
            lines.append(
                f"| {way} | {row['seconds']:.2f} s | {row['time_over_stored']:.2f}x | "
                f"{'' if kept is None else format(kept['time_over_stored'], '.2f') + 'x'} | "
                f"{row['flops_over_stored']:.2f}x | "
                f"{format_bytes(row['peak_bytes'])} | {row['gradient_off']:.0e} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--size", type=int, default=64, help="voxels of an edge of the volume")
    parser.add_argument("--keep-freed", action="store_true", help="add times where malloc keeps what is freed")
    given = parser.parse_args()
    subjects = {f"{subject}, 1x{channels}x{given.size}^3": subject for subject, (_, channels) in SUBJECTS.items()}
    before = earlier(RESULTS)
    if given.keep_freed:
        have_freed_memory_kept(parser, missing=subjects.keys() - before.keys())
    results = {}
    for name, subject in subjects.items():
        results[name] = rows = measure(subject, given.size, repeats=given.repeats)
        if given.keep_freed:
            timed = {way: {"kept": row} for way, row in rows.items() if "error" not in row}
            results[name] = {way: {**row, **timed.get(way, {})} for way, row in before[name].items()}
    text = table(results)
    print(text)
    insert(HERE / "README.md", name="reversible", text=text)
    keep(RESULTS, command="python -m experiments.speed.reversible, and again with --keep-freed", results=results)


if __name__ == "__main__":
    main()
