"""One micro-step of private training against plain training, measured in turn in one run.

    python -m experiments.speed.ghost

GPT-2 with 4 layers and its full vocabulary, random weights, float32, no noise and no optimizer: forward, backward, and
for the private ones the clipped sum. memsave runs the tied model as it is; Opacus, which refuses tied weights, an
untied one with position ids given for each example.
"""

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.record import insert, keep, machine, median
from memsave.ghost import GhostClipper
from memsave.profiler import MemoryRecorder, format_bytes

HERE = Path(__file__).parent
SHAPES = [(8, 100), (2, 512)]
BOUND = 0.1


def network(*, tied: bool) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=tied)
    return GPT2LMHeadModel(config).train()


def losses_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Each example's mean next-token loss, (B,)."""
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1).contiguous()
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def plain(model: nn.Module) -> Callable[[Tensor], object]:
    return lambda ids: losses_of(model, ids).sum().backward()


def memsave(passes: int) -> Callable[[nn.Module], Callable[[Tensor], object]]:
    def prepare(model: nn.Module) -> Callable[[Tensor], object]:
        clipper = GhostClipper(model, max_grad_norm=BOUND, passes=passes)
        return lambda ids: clipper.backward(losses_of(model, ids))

    return prepare


def opacus_hooks(model: nn.Module) -> Callable[[Tensor], object]:
    """Per-example gradients by hooks, then their clipped sum as Opacus's optimizer forms it."""
    from opacus.grad_sample import GradSampleModule

    wrapped = GradSampleModule(model, loss_reduction="sum")

    def step(ids: Tensor) -> None:
        losses_of(wrapped, ids).sum().backward()
        samples = [p.grad_sample for p in wrapped.parameters() if p.grad_sample is not None]
        norms = torch.stack([s.flatten(1).norm(dim=1) for s in samples], 1).norm(dim=1)
        factors = (BOUND / (norms + 1e-6)).clamp(max=1.0)
        for p in wrapped.parameters():
            p.grad = torch.einsum("i,i...", factors, p.grad_sample)
            p.grad_sample = None

    return step


def opacus_ghost(model: nn.Module) -> Callable[[Tensor], object]:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=BOUND, use_ghost_clipping=True, loss_reduction="sum"
    )

    def step(ids: Tensor) -> None:
        wrapped.enable_hooks()
        losses = losses_of(wrapped, ids)
        losses.sum().backward(retain_graph=True)
        factors = wrapped.get_clipping_coef()
        for p in wrapped.parameters():
            p.grad = None
        wrapped.disable_hooks()
        (factors * losses).sum().backward()

    return step


WAYS: dict[str, tuple[Callable[[nn.Module], Callable[[Tensor], object]], bool]] = {
    "plain": (plain, True),
    "memsave, one pass": (memsave(1), True),
    "memsave, two passes": (memsave(2), True),
    "Opacus ghost (untied)": (opacus_ghost, False),
    "Opacus hooks (untied)": (opacus_hooks, False),
}


def measure(batch: int, places: int, *, repeats: int) -> dict:
    ids = torch.randint(50257, (batch, places), generator=torch.Generator().manual_seed(1))
    models = {way: network(tied=tied) for way, (_, tied) in WAYS.items()}
    steps = {way: prepare(models[way]) for way, (prepare, _) in WAYS.items()}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(repeats + 1):  # the first round warms up
        for way, step in steps.items():
            started = time.perf_counter()
            step(ids)
            if repeat:
                seconds[way].append(time.perf_counter() - started)
            for p in models[way].parameters():
                p.grad = None
            gc.collect()
    rows = {}
    for way, step in steps.items():
        with MemoryRecorder(models[way]) as recorder:
            step(ids)
        for p in models[way].parameters():
            p.grad = None
        report = recorder.report()
        rows[way] = {
            "seconds": median(seconds[way]),
            "time_over_plain": median([a / b for a, b in zip(seconds[way], seconds["plain"], strict=True)]),
            "peak_bytes": report.peak_bytes,
            "peak_above_parameters": report.peak_bytes - report.peak_by_category["parameter"],
        }
    for row in rows.values():
        row["memory_over_plain"] = row["peak_above_parameters"] / rows["plain"]["peak_above_parameters"]
    return rows


def table(results: dict[str, dict]) -> str:
    rows = [f"{machine()}:\n"]
    for shape, each in results.items():
        rows += [f"| {shape} | time | over plain | peak above parameters | over plain |", "|---|---|---|---|---|"]
        for way, row in each.items():
            rows.append(
                f"| {way} | {row['seconds']:.2f} s | {row['time_over_plain']:.2f}x | "
                f"{format_bytes(row['peak_above_parameters'])} | {row['memory_over_plain']:.2f}x |"
            )
        rows.append("")
    return "\n".join(rows).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    results = {f"B={b}, T={t}": measure(b, t, repeats=repeats) for b, t in SHAPES}
    print(table(results))
    for document in (HERE / "README.md", HERE.parents[1] / "README.md"):
        insert(document, name="ghost", text=table(results))
    keep(HERE / "ghost.json", command="python -m experiments.speed.ghost", results=results)


if __name__ == "__main__":
    main()
