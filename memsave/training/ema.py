"""An exponential moving average of the weights, which is evaluated and released instead of the weights.

    average <- d average + (1 - d) weights,    d = min(decay, (1 + t) / (10 + t)) after step t

The smaller decay of the first steps reduces the weight of the random initialization (Polyak and Juditsky, 1992; the
warm-up is TensorFlow's).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """The average of a model's trainable parameters; it takes as much memory as these."""

    def __init__(self, model: nn.Module, *, decay: float):
        if not 0 < decay < 1:
            raise ValueError(f"decay is {decay}; give a number between 0 and 1, such as 0.999")
        self.decay = decay
        self.average: dict[str, Tensor] = {name: p.detach().clone() for name, p in _trainable(model)}

    @torch.no_grad()
    def update(self, model: nn.Module, *, step: int) -> None:
        """Update the average with the weights after step `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in _trainable(model):
            self.average[name].lerp_(parameter, 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Context in which the model's weights are the average."""
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for name, parameter in _trainable(model):
            weights = parameter.clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(weights)


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
