"""One micro-step of private training against plain training, measured in turn in one run.

    python -m experiments.speed.ghost                            # all shapes; each by itself with --shape NAME
    python -m experiments.speed.ghost --shape short --repeats 7
    python -m experiments.speed.ghost --shape short --profile    # where the time goes; nothing is written
    python -m experiments.speed.ghost --keep-freed               # times again where malloc keeps what is freed
    python -m experiments.speed.ghost --flops                    # FLOPs alone, for rows that are there

GPT-2 with its full vocabulary, random weights, float32, no noise and no optimizer: forward, backward, and for the
private ones the clipped sum. "plain" is Hugging Face's own step, with its own loss; "plain, lean" has our chunked head
and PyTorch's tanh GELU in the place of Hugging Face's, like the private steps that are not marked otherwise. Opacus,
which refuses tied weights, has an untied model with position ids given for each example.

Whether examples are independent is checked in the first steps of a run, and later in a random step of 128, on average.
Steps are timed without this check; "with a check" times one that has it.

The column of FLOPs counts matrix products and attention of one step: no step can be faster than that, relative to
plain, where these take all the time.

glibc's malloc returns large blocks to the system, which hands them out again page by page: large tensors cost time for
being large. `--keep-freed` takes that out of the comparison, which flatters those who make fewer of them.
"""

import argparse
import datetime
import gc
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from experiments.record import have_freed_memory_kept, insert, keep, median
from memsave.ghost import GhostClipper
from memsave.ghost.independence import IndependenceSchedule
from memsave.models.language import causal_lm_losses, fuse_gelu, set_checkpointing
from memsave.profiler import MemoryRecorder, format_bytes
from memsave.training.result import hardware

HERE = Path(__file__).parent
RESULTS = HERE / "ghost.json"
BOUND = 0.1
Step = Callable[[Tensor], object]


@dataclass(frozen=True)
class Shape:
    """What a step is of."""

    layers: int
    batch: int
    places: int
    checkpoints: bool = False
    width: int = 768
    heads: int = 12
    vocabulary: int = 50257

    def __str__(self) -> str:
        width = f" of width {self.width}" if self.width != Shape.width else ""
        kept = ", checkpoints" if self.checkpoints else ""
        return f"{self.layers} layers{width}, B={self.batch}, T={self.places}{kept}"


SHAPES = {
    "small": Shape(3, 16, 64, width=128, heads=4, vocabulary=2048),  # experiment=gpt2_dp
    "short": Shape(4, 8, 100),
    "long": Shape(4, 2, 512),
    "deep": Shape(12, 1, 1024),
    "checkpoints": Shape(12, 1, 1024, checkpoints=True),
}
RESULTS_PAGE = ("short", "long")  # the shapes in docs/results.md, which shows the rows below
SHOWN = ("plain", "plain, lean", "memsave, one pass", "Opacus ghost (untied)", "Opacus hooks (untied)")


def network(shape: Shape, way: str) -> nn.Module:
    """Of any shape, "plain" is without checkpoints: it is what all others are compared with."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": shape.layers, "n_embd": shape.width, "n_head": shape.heads, "vocab_size": shape.vocabulary}
    sizes |= {"tie_word_embeddings": not way.startswith("Opacus"), "loss_type": "ForCausalLM"}
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).train()
    if shape.checkpoints and way != "plain":
        set_checkpointing(model, on=True)
    return model


def plain(model: nn.Module) -> Step:
    return lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def lean(model: nn.Module) -> Step:
    fuse_gelu(model)
    return lambda ids: causal_lm_losses(model, ids, ids).sum().backward()


def memsave(model: nn.Module, *, head: str = "chunked", **options: Any) -> Step:
    fuse_gelu(model)
    clipper = GhostClipper(model, max_grad_norm=BOUND, **options)
    return lambda ids: clipper.backward(causal_lm_losses(model, ids, ids, head=head))


def checking(kind: str) -> AbstractContextManager:
    """Every backward makes this check of `IndependenceSchedule`: "quick", or "" for none."""
    return patch.object(IndependenceSchedule, "next_check", lambda schedule, *, unchecked: kind)


def memsave_with_check(model: nn.Module) -> Step:
    step = memsave(model, passes=1)

    def checked(ids: Tensor) -> None:
        with checking("quick"):
            step(ids)

    return checked


def with_positions(model: nn.Module, ids: Tensor) -> Tensor:
    """Each example's mean next-token loss, (B,), as Opacus can clip it."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1).contiguous()
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def opacus_hooks(model: nn.Module) -> Step:
    """Per-example gradients by hooks, then their clipped sum as Opacus's optimizer forms it."""
    from opacus.grad_sample import GradSampleModule

    wrapped = GradSampleModule(model, loss_reduction="sum")

    def step(ids: Tensor) -> None:
        with_positions(wrapped, ids).sum().backward()
        samples = [p.grad_sample for p in wrapped.parameters() if p.grad_sample is not None]
        norms = torch.stack([s.flatten(1).norm(dim=1) for s in samples], 1).norm(dim=1)
        factors = (BOUND / (norms + 1e-6)).clamp(max=1.0)
        for p in wrapped.parameters():
            p.grad = torch.einsum("i,i...", factors, p.grad_sample)
            p.grad_sample = None

    return step


def opacus_ghost(model: nn.Module) -> Step:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=BOUND, use_ghost_clipping=True, loss_reduction="sum"
    )

    def step(ids: Tensor) -> None:
        wrapped.enable_hooks()
        losses = with_positions(wrapped, ids)
        losses.sum().backward(retain_graph=True)
        factors = wrapped.get_clipping_coef()
        for p in wrapped.parameters():
            p.grad = None
        wrapped.disable_hooks()
        (factors * losses).sum().backward()

    return step


WAYS: dict[str, Callable[[nn.Module], Step]] = {
    "plain": plain,
    "plain, checkpoints": plain,
    "plain, lean": lean,
    "memsave, one pass": partial(memsave, passes=1),
    "memsave, one pass, logits kept": partial(memsave, passes=1, memory_budget=2**30),
    "memsave, one pass, the model's logits": partial(memsave, passes=1, head="logits"),
    "memsave, two passes": partial(memsave, passes=2),
    "memsave, per layer": partial(memsave, clipping="per_layer"),
    "memsave, one pass, with a check": memsave_with_check,
    "Opacus ghost (untied)": opacus_ghost,
    "Opacus hooks (untied)": opacus_hooks,
}


def ways_for(shape: Shape, wanted: list[str] | None) -> list[str]:
    """Opacus's ways do not run under checkpoints that are not reentrant."""
    names = [way for way in WAYS if not (shape.checkpoints and way.startswith("Opacus"))]
    names = [way for way in names if shape.checkpoints or way != "plain, checkpoints"]
    return [way for way in names if wanted is None or way == "plain" or way in wanted]


def prepared(shape: Shape, ways: list[str]) -> tuple[dict[str, nn.Module], dict[str, Step], Tensor]:
    """(models, their steps, token ids (B, T))."""
    ids = torch.randint(shape.vocabulary, (shape.batch, shape.places), generator=torch.Generator().manual_seed(1))
    models = {way: network(shape, way) for way in ways}
    return models, {way: WAYS[way](models[way]) for way in ways}, ids


def drop_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None
    gc.collect()


aten = torch.ops.aten
FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten.addmm_: flop_registry[aten.addmm],
    aten.baddbmm_: flop_registry[aten.baddbmm],
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: 4 * q.numel() * k.shape[-2],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, *_, **__: 10 * q.numel() * k.shape[-2],
}


class FlopCount(TorchDispatchMode):
    """Counts as `FlopCounterMode` does, which follows modules, too, and so reads outputs that must not be read.

    Operators in place and attention on the CPU are counted as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        formula = FLOPS.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=output)
        return output


def flops_of(model: nn.Module, step: Step, ids: Tensor) -> int:
    """The FLOPs of a step, as it is timed."""
    with checking(""), FlopCount() as count:
        step(ids)
    drop_gradients(model)
    return count.total


def measure(shape: Shape, ways: list[str], *, repeats: int) -> dict[str, dict]:
    models, steps, ids = prepared(shape, ways)
    rows: dict[str, dict] = {}
    for way, step in steps.items():  # which warms up, too
        step(ids)
        drop_gradients(models[way])
        with MemoryRecorder(models[way]) as recorder:
            step(ids)
        drop_gradients(models[way])
        peaks = recorder.report().peak_by_category
        above = sum(peaks.values()) - peaks["parameter"]
        flops = flops_of(models[way], step, ids)
        rows[way] = {"peak_above_parameters": above, "peak_by_category": peaks, "flops": flops}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, step in steps.items():
            started = time.perf_counter()
            with checking(""):
                step(ids)
            seconds[way].append(time.perf_counter() - started)
            drop_gradients(models[way])
    first = rows["plain"]["peak_above_parameters"]
    for way, row in rows.items():
        row["memory_over_plain"] = row["peak_above_parameters"] / first
        row["flops_over_plain"] = row["flops"] / rows["plain"]["flops"]
        row["rounds"] = seconds[way]
        if repeats:
            row["seconds"] = median(seconds[way])
            row["time_over_plain"] = median([a / b for a, b in zip(seconds[way], seconds["plain"], strict=True)])
    return rows


def profile(shape: Shape, ways: list[str]) -> None:
    """Print the operators of a step of each way that take the most time."""
    models, steps, ids = prepared(shape, ways)
    for way, step in steps.items():
        step(ids)
        drop_gradients(models[way])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            step(ids)
        drop_gradients(models[way])
        print(f"{shape}, {way}")
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40))


def so_far() -> dict[str, Any]:
    """The results by shape, each with the hardware on which it was measured."""
    content = json.loads(RESULTS.read_text())
    return {name: {"hardware": content["hardware"], **each} for name, each in content["results"].items()}


def count_flops(shape: Shape, rows: dict[str, dict]) -> None:
    """Add the FLOPs to rows that were measured before; they depend on the shape alone."""
    models, steps, ids = prepared(shape, ways_for(shape, list(rows)))
    for way, step in steps.items():
        step(ids)
        drop_gradients(models[way])
        rows[way]["flops"] = flops_of(models[way], step, ids)
    for row in rows.values():
        row["flops_over_plain"] = row["flops"] / rows["plain"]["flops"]


def _ratio(value: float | None) -> str:
    """1.08x; empty where it was not measured."""
    return "" if value is None else f"{value:.2f}x"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def table(results: dict[str, dict], *, shown: tuple[str, ...] | None = None) -> str:
    rows = []
    for each in results.values():
        where = each["hardware"]
        rows += [
            f"measured on {where['gpu'] or where['cpu']}, {where['threads']} threads, {each['date']}:",
            "",
            f"| {each['shape']} | time | over plain | over plain, freed memory kept | FLOPs over plain "
            "| peak above parameters | over plain |",
            "|---|---|---|---|---|---|---|",
        ]
        for way, row in each["ways"].items():
            if shown is None or way in shown:
                kept = each.get("kept", {}).get(way, {})
                rows.append(
                    f"| {way} | {_seconds(row['seconds'])} | {row['time_over_plain']:.2f}x | "
                    f"{_ratio(kept.get('time_over_plain'))} | {_ratio(row.get('flops_over_plain'))} | "
                    f"{format_bytes(row['peak_above_parameters'])} | {row['memory_over_plain']:.2f}x |"
                )
        rows.append("")
    return "\n".join(rows).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, action="append", help="may be given several times; all by default")
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="all by default; with these, nothing is written")
    parser.add_argument("--repeats", type=int, default=7, help="0 measures memory alone, and nothing is written")
    parser.add_argument("--profile", action="store_true", help="print where the time goes; nothing is written")
    parser.add_argument("--keep-freed", action="store_true", help="time, without Opacus, where malloc keeps memory")
    parser.add_argument("--flops", action="store_true", help="count the FLOPs of rows that are there, without times")
    options = parser.parse_args()
    results, names = so_far(), options.shape or list(SHAPES)
    chosen = options.ways
    if options.keep_freed:
        here = {name for name, each in results.items() if each["hardware"] == hardware()}
        have_freed_memory_kept(parser, missing=set(names) - here)
        chosen = chosen or [way for way in WAYS if not way.startswith("Opacus")]
    for name in names:
        shape = SHAPES[name]
        ways = ways_for(shape, chosen)
        if options.flops:
            count_flops(shape, results[name]["ways"])
            continue
        if options.profile:
            profile(shape, ways)
            continue
        rows = measure(shape, ways, repeats=options.repeats)
        if options.keep_freed:
            results[name]["kept"] = rows
        else:
            today = datetime.date.today().isoformat()
            results[name] = {"shape": str(shape), "date": today, "hardware": hardware(), "ways": rows}
        for way, row in rows.items():
            timed = f"{row['seconds']:.2f} s, {row['time_over_plain']:.2f}x; " if options.repeats else ""
            print(
                f"{shape}: {way}: {timed}{format_bytes(row['peak_above_parameters'])}, {row['memory_over_plain']:.2f}x"
            )
    if options.profile or options.ways or not (options.repeats or options.flops):
        return
    results = {name: results[name] for name in SHAPES if name in results}
    insert(HERE / "README.md", name="ghost", text=table(results))
    if set(RESULTS_PAGE) <= results.keys():
        page = HERE.parents[1] / "docs" / "results.md"
        insert(page, name="ghost", text=table({n: results[n] for n in RESULTS_PAGE}, shown=SHOWN))
    keep(RESULTS, command="python -m experiments.speed.ghost, and again with --keep-freed", results=results)


if __name__ == "__main__":
    main()
