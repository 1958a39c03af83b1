"""A regression task with a few parameters."""

import torch
from torch import nn

from memsave.config.schema import OptimizerConfig, TrainerConfig


class Lines:
    """Linear regression; the loss of an example is its squared error."""

    def __init__(self, *, batch_size=6, batches=8, dtype=torch.float64):
        generator = torch.Generator("cpu").manual_seed(0)
        self.data = [
            {
                "x": torch.randn(batch_size, 3, dtype=dtype, generator=generator, device="cpu"),
                "y": torch.randn(batch_size, dtype=dtype, generator=generator, device="cpu"),
            }
            for _ in range(batches)
        ]

    size = 48

    def load(self, indices):
        rows = [(self.data[each.draw // 6], each.draw % 6) for each in indices]
        return {key: torch.stack([batch[key][row] for batch, row in rows]) for key in ("x", "y")}

    def place(self, batch):
        return {key: value.to(torch.get_default_device()) for key, value in batch.items()}

    def per_example_losses(self, model, batch):
        return (model(batch["x"]).squeeze(1) - batch["y"]).square()


def line_model(dtype=torch.float64):
    """The same weights on every device."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 1))
    return model.to(torch.get_default_device(), dtype)


def trainer(**options):
    optimizer = OptimizerConfig(lr=0.05, warmup_steps=2)
    return TrainerConfig(**{"steps": 8, "batch_size": 6, "optimizer": optimizer, **options})
