"""Memory and time of a step of the U-Net on the GPU, by memory mode, engine and precision; and of its operators."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.gpu.exactness import ENGINES, precision, set_engine
from experiments.gpu.measure import DEVICE, Step, free, measure
from memsave.models import ReversibleUNet3d
from memsave.models.norm import GroupNorm
from memsave.models.pointwise import pointwise_conv3d

CHANNELS = (16, 32, 64)
BLOCKS = 2
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}
PRECISIONS = ("float32", "float32, TF32", "bfloat16 autocast")


def volumes(size: tuple[int, int, int], *, repeats: int, precisions: tuple[str, ...]) -> dict[str, Any]:
    """By precision and mode: peak and time of forward and backward on a volume (1, 4, *size)."""
    torch.manual_seed(0)
    model = ReversibleUNet3d(channels=CHANNELS, blocks=BLOCKS).to(DEVICE)
    x = torch.randn(1, 4, *size, device=DEVICE)

    def step(mode: str, engine: str, name: str) -> None:
        model.memory = mode
        if mode == "reversible":
            set_engine(model, engine)
        with precision(name):
            loss = model(x).float().square().mean()
        loss.backward()
        model.zero_grad()

    rows: dict[str, Any] = {}
    for name in precisions:
        modes = {"stored": ("stored", "hooks"), "checkpoint": ("checkpoint", "hooks")}
        modes |= {f"reversible, {engine}": ("reversible", engine) for engine in ENGINES}
        steps: dict[str, Step] = {each: partial(step, *way, name) for each, way in modes.items()}
        print(f"U-Net, {size}, {name}", flush=True)
        rows[name] = measure(steps, repeats=repeats)
    precision("float32")
    return rows


def operators(size: int, *, repeats: int) -> dict[str, Any]:
    """By operator, layout and precision: seconds of forward and backward on (1, 96, size, size, size)."""
    rows: dict[str, Any] = {}
    for name in PRECISIONS:
        for layout in LAYOUTS:
            print(f"operators, {name}, {layout}", flush=True)
            rows[f"{name}, {layout}"] = measure(operator_steps(size, layout=layout, name=name), repeats=repeats)
            free()
    precision("float32")
    return rows


def operator_steps(size: int, *, layout: str, name: str) -> dict[str, Step]:
    channels, kept = 96, LAYOUTS[layout]
    x = torch.randn(1, channels, size, size, size, device=DEVICE).contiguous(memory_format=kept)
    narrow = x[:, :16].contiguous(memory_format=kept)
    dtype = torch.bfloat16 if name == "bfloat16 autocast" else torch.float32
    x, narrow = x.to(dtype).requires_grad_(), narrow.to(dtype).requires_grad_()
    filters = torch.randn(channels, 1, 3, 3, 3, device=DEVICE, dtype=dtype, requires_grad=True)
    expand = torch.randn(channels, 16, 1, 1, 1, device=DEVICE, dtype=dtype, requires_grad=True)
    norm = GroupNorm(8, channels, device=DEVICE, dtype=dtype)

    def both(function: Callable[[], Tensor], over: list[Tensor]) -> None:
        precision("float32, TF32" if "TF32" in name else "float32")
        y = function()
        torch.autograd.grad(y, over, torch.ones_like(y))

    return {
        "depthwise": partial(both, lambda: F.conv3d(x, filters, padding=1, groups=channels), [x, filters]),
        "1x1x1, 16 to 96, PyTorch": partial(both, lambda: F.conv3d(narrow, expand), [narrow, expand]),
        "1x1x1, 16 to 96, memsave": partial(both, lambda: pointwise_conv3d(narrow, expand), [narrow, expand]),
        "GroupNorm, PyTorch": partial(both, lambda: nn.GroupNorm.forward(norm, x), [x, *norm.parameters()]),
        "GroupNorm, memsave": partial(both, lambda: norm(x), [x, *norm.parameters()]),
        "SiLU": partial(both, lambda: F.silu(x), [x]),
    }
