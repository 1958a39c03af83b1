"""Gradients of reversible libraries against the stored network, in common uses of a network.

    pip install --no-deps memcnn==1.5.2 revtorch==0.2.4 RevLib==1.7.2
    python -m experiments.reversible_peers

Each library runs the same two blocks with the same weights in float64, and preserves random states if it can. A cell is
the relative error of the gradient of parameters and input, or the exception.
"""

import copy
import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from experiments.record import insert, keep, machine, without_options
from memsave.reversible import AdditiveCoupling, ReversibleSequence

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BLOCKS, HALF = 2, 4
EXACT = 1e-9

Grads = dict[str, Tensor]
Pairs = list[tuple[nn.Module, nn.Module]]


def branch(norm: type[nn.Module], dropout: float) -> nn.Module:
    return nn.Sequential(nn.Conv2d(HALF, HALF, 3, padding=1), norm(HALF), nn.SiLU(), nn.Dropout(dropout))


def pairs_of(*, norm: Callable[[int], nn.Module] = lambda c: nn.GroupNorm(2, c), dropout: float = 0.0) -> Pairs:
    torch.manual_seed(0)
    return [(branch(norm, dropout).double(), branch(norm, dropout).double()) for _ in range(BLOCKS)]


def stored(pairs: Pairs) -> nn.Module:
    return ReversibleSequence((AdditiveCoupling(f, g) for f, g in pairs), recompute=False)


def ours(pairs: Pairs) -> nn.Module:
    return ReversibleSequence(AdditiveCoupling(f, g) for f, g in pairs)


def memcnn(pairs: Pairs) -> nn.Module:
    import memcnn

    couplings = (memcnn.AdditiveCoupling(Fm=f, Gm=g) for f, g in pairs)
    return nn.Sequential(*(memcnn.InvertibleModuleWrapper(each, preserve_rng_state=True) for each in couplings))


def revtorch(pairs: Pairs) -> nn.Module:
    import revtorch

    return revtorch.ReversibleSequence(
        nn.ModuleList(revtorch.ReversibleBlock(f, g, fix_random_seed=True) for f, g in pairs)
    )


def revlib(mode: str) -> Callable[[Pairs], nn.Module]:
    def make(pairs: Pairs) -> nn.Module:
        import revlib

        return revlib.ReversibleSequential(
            *(module for pair in pairs for module in pair), memory_mode=revlib.MemoryModes[mode]
        )

    return make


LIBRARIES: dict[str, Callable[[Pairs], nn.Module]] = {
    "memsave": ours,
    "MemCNN 1.5.2": memcnn,
    "RevTorch 0.2.4": revtorch,
    "RevLib 1.7.2, function": revlib("autograd_function"),
    "RevLib 1.7.2, graph": revlib("autograd_graph"),
}


def image(scale: float = 1.0) -> Tensor:
    return scale * torch.randn(2, 2 * HALF, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def named(pairs: Pairs) -> Iterator[tuple[str, nn.Parameter]]:
    for number, pair in enumerate(pairs):
        for which, module in zip("fg", pair, strict=True):
            yield from ((f"{number}.{which}.{name}", p) for name, p in module.named_parameters())


def grads_of(pairs: Pairs, x: Tensor | None = None) -> Grads:
    """The gradients in `.grad`; a missing gradient counts as zero."""
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named(pairs)}
    return grads if x is None else {**grads, "x": torch.zeros_like(x) if x.grad is None else x.grad}


def step(net: nn.Module, pairs: Pairs) -> Grads:
    x = image().requires_grad_()
    net(x * 1.0).square().mean().backward()
    return grads_of(pairs, x)


def autograd_grad(net: nn.Module, pairs: Pairs) -> Grads:
    x = image().requires_grad_()
    wanted = dict(named(pairs))
    found = torch.autograd.grad(net(x * 1.0).square().mean(), list(wanted.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(wanted.items(), found, strict=True)}


def no_input_grad(net: nn.Module, pairs: Pairs) -> Grads:
    net(image()).square().mean().backward()
    return grads_of(pairs)


def two_forwards(net: nn.Module, pairs: Pairs) -> Grads:
    x = image().requires_grad_()
    (net(x * 1.0).square().mean() + net(x * 2.0 + 1).sin().mean()).backward()
    return grads_of(pairs, x)


def second_backward(net: nn.Module, pairs: Pairs) -> Grads:
    x = image().requires_grad_()
    loss = net(x * 1.0).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()
    return grads_of(pairs, x)


def double_backward(net: nn.Module, pairs: Pairs) -> Grads:
    x = image().requires_grad_()
    (slope,) = torch.autograd.grad(net(x * 1.0).pow(3).mean(), x, create_graph=True)
    slope.square().sum().backward()
    return grads_of(pairs)


def skip(net: nn.Module, pairs: Pairs) -> Grads:
    x = image().requires_grad_()
    hidden = torch.relu(x * 1.0)
    (hidden * net(hidden)).square().mean().backward()
    return grads_of(pairs, x)


def outer_checkpoint(net: nn.Module, pairs: Pairs) -> Grads:
    x = image().requires_grad_()
    checkpoint(net, x * 1.0, use_reentrant=False).square().mean().backward()
    return grads_of(pairs, x)


def moved_buffers(net: nn.Module, pairs: Pairs) -> Grads:
    step(net, pairs)
    buffers = ((f"{n}.{name}", b) for n, pair in enumerate(pairs) for m in pair for name, b in m.named_buffers())
    return {name: buffer.double() for name, buffer in buffers}


def autocast(net: nn.Module, pairs: Pairs) -> Grads:
    x = image().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = net.float()(x * 1.0).float().square().mean()
    loss.backward()
    return grads_of(pairs, x)


def batch_norm() -> Pairs:
    return pairs_of(norm=nn.BatchNorm2d)


def dropout() -> Pairs:
    return pairs_of(dropout=0.3)


USES: dict[str, tuple[Callable[[nn.Module, Pairs], Grads], Callable[[], Pairs]]] = {
    "one step": (step, pairs_of),
    "dropout": (step, dropout),
    "`torch.autograd.grad`": (autograd_grad, pairs_of),
    "an input without grad": (no_input_grad, pairs_of),
    "two forwards before one backward": (two_forwards, pairs_of),
    "the same with dropout": (two_forwards, dropout),
    "a second backward": (second_backward, pairs_of),
    "double backward": (double_backward, pairs_of),
    "a ReLU before and a skip around": (skip, pairs_of),
    "a checkpoint around, dropout inside": (outer_checkpoint, dropout),
    "BatchNorm's statistics after a step": (moved_buffers, batch_norm),
    "bfloat16 autocast on the CPU": (autocast, pairs_of),
}


def outcome(library: str, use: str) -> float | str:
    """The relative error against the stored network, or the failure; in a separate process, because some crash."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=lambda: theirs.send(attempt(library, use)))
    process.start()
    process.join()
    return ours.recv() if process.exitcode == 0 else "a crash of the process"


def attempt(library: str, use: str) -> float | str:
    """The relative error against the stored network, or the name of the exception."""
    torch.set_num_threads(1)
    run, make_pairs = USES[use]
    pairs = make_pairs()
    twins = copy.deepcopy(pairs)
    torch.manual_seed(5)
    expected = run(stored(twins), twins)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = LIBRARIES[library](pairs)
            torch.manual_seed(5)
            found = run(net, pairs)
    except Exception as error:
        return type(error).__name__
    difference = sum((found[name].double() - value.double()).square().sum() for name, value in expected.items())
    size = sum(value.double().square().sum() for value in expected.values())
    return float((difference / size).sqrt())


def cell(use: str, value: float | str) -> str:
    exact = 0.02 if "bfloat16" in use else EXACT  # the precision of bfloat16
    if isinstance(value, str):
        return value
    return "right" if value <= exact else f"**wrong by {value:.0%}**"


def main() -> None:
    results: dict[str, dict[str, Any]] = {
        use: {library: outcome(library, use) for library in LIBRARIES} for use in USES
    }
    lines = ["| | " + " | ".join(LIBRARIES) + " |", "|---" * (len(LIBRARIES) + 1) + "|"]
    for use, row in results.items():
        lines.append(f"| {use} | " + " | ".join(cell(use, value) for value in row.values()) + " |")
    text = f"{machine()}:\n\n" + "\n".join(lines)
    print(text)
    for document in (HERE / "README.md", ROOT / "docs" / "reversible.md"):
        insert(document, name="peers", text=text)
    keep(HERE / "results.json", command="python -m experiments.reversible_peers", results=results)


if __name__ == "__main__":
    without_options(__doc__)
    main()
