"""Several trained networks as one, such as those of the folds of a cross-validation."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memsave.config import ConfigError
from memsave.tasks.loading import load_unet

OWN = ("model", "crop_size", "smallest_et", "precision", "mask")
"""Fields of a `UNetConfig` in which the networks may differ; the first one's hold for all."""


class Ensemble(nn.Module):
    """The logits (B, R, D, H, W) of the mean probability of the networks, for volumes (B, C, D, H, W)."""

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)
        first: Any = networks[0]
        self.config = first.config
        """The `UNetConfig` of the first network."""

    def forward(self, x: Tensor) -> Tensor:
        """The logits of the mean probability, in float32."""
        mean = torch.stack([network(x).float().sigmoid() for network in self.networks]).mean(0)
        return torch.logit(mean, eps=1e-6)


def load_networks(folders: Sequence[str]) -> Any:
    """The network of one run's folder, or the `Ensemble` of several. Raises ConfigError if their inputs differ."""
    networks = [load_unet(Path(folder).expanduser()) for folder in folders]
    first = networks[0]
    for folder, network in zip(folders[1:], networks[1:], strict=True):
        for field in fields(first.config):
            one, other = getattr(first.config, field.name), getattr(network.config, field.name)
            if field.name not in OWN and one != other:
                raise ConfigError(
                    f"{folders[0]} has {field.name} {one}, and {folder} has {other}; give runs that were trained alike"
                )
    return first if len(networks) == 1 else Ensemble(networks)
