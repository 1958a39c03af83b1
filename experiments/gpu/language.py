"""Memory and time of a private step of GPT-2 on the GPU, beside the plain step and Opacus."""

from functools import partial
from typing import Any

import torch
from torch import nn

from experiments.gpu.exactness import precision
from experiments.gpu.measure import DEVICE, Step, free, measure
from experiments.speed.ghost import WAYS, Shape, network

LEFT_OUT = ("plain, checkpoints", "memsave, per layer", "memsave, one pass, with a check")


def language(shape: Shape, *, repeats: int, precisions: tuple[str, ...]) -> dict[str, Any]:
    """By precision and way: peak above the parameters, and time, of forward, backward and clipped sum."""
    ids = torch.randint(50257, (shape.batch, shape.places), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    rows: dict[str, Any] = {}
    for name in precisions:
        steps: dict[str, Step] = {}
        for way in WAYS:
            if way not in LEFT_OUT:
                with DEVICE:
                    model = network(shape, way)
                steps[way] = partial(take, model, WAYS[way](model), ids, name)
        print(f"GPT-2, {shape}, {name}", flush=True)
        rows[name] = measure(steps, repeats=repeats)
        steps.clear()
        free()
    precision("float32")
    return rows


def take(model: nn.Module, step: Any, ids: torch.Tensor, name: str) -> None:
    with precision(name):
        step(ids)
    for p in model.parameters():
        p.grad = None
