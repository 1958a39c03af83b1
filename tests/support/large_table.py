"""A model with parameters of its own beside children of real size."""

import torch
from torch import nn

ROWS = 2**17 + 1
WIDTH = 8  # the table has more than 2**20 elements, so the model cannot be replayed as one small layer


class BesideTable(nn.Module):
    """Token ids (B, T) through a large table, `inside`, and a head; subclasses own parameters."""

    def __init__(self, *arguments, rows=ROWS):
        super().__init__()
        torch.manual_seed(5)
        self.look, self.head = nn.Embedding(rows, WIDTH), nn.Linear(WIDTH, 2)
        self.build(*arguments)
        for name, parameter in self.named_parameters():
            if "." not in name and not parameter.is_complex():
                nn.init.normal_(parameter, 0.3, 0.5)

    def build(self):
        """Make the parameters."""

    def inside(self, x):  # (B, T, d)
        return x

    def forward(self, ids):
        return self.head(self.inside(self.look(ids)).tanh())


def parameter(*shape):
    """A parameter that `BesideTable` fills."""
    return nn.Parameter(torch.empty(shape))
