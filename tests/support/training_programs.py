"""Small training steps whose memory the tests know."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class ConvNet(nn.Module):
    """Convolutions, GroupNorm, BatchNorm's buffers, residual sums; optionally a checkpoint per block."""

    def __init__(self, *, depth: int = 3, width: int = 4, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.stem = nn.Conv2d(2, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(2, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x))
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x))
        return self.head(x.mean(dim=(2, 3)))


class Square(torch.autograd.Function):
    """x * x: saves x, and creates a temporary in its backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * (2 * x)


@dataclass
class Program:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[], list[torch.Tensor]]
    """Runs one training step and returns copies of loss and gradients."""


def conv_program(*, size: int = 8, release: bool = False, warm: bool = False, **net: Any) -> Program:
    """AdamW on a `ConvNet`; `release` frees the gradients at the end of a step, `warm` runs one step before."""
    torch.manual_seed(0)
    model = ConvNet(**net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True)
    x, target = torch.randn(2, 2, size, size), torch.randn(2, 3)

    def step() -> list[torch.Tensor]:
        if not release:
            optimizer.zero_grad(set_to_none=True)
        loss = Square.apply(model(x) - target).mean()
        loss.backward()
        optimizer.step()
        if release:
            optimizer.zero_grad(set_to_none=True)
            return []
        return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    if warm:
        step()
    return Program(model, optimizer, step)
