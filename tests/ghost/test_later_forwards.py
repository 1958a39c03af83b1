"""Forwards after the first one, which are not followed unless that is needed."""

import pytest
import torch
from torch import nn

from memsave.ghost import GhostClipper
from tests.support.per_example_reference import by_loop

pytestmark = pytest.mark.usefixtures("device")

COPIES = {
    "repeat": lambda table, batch: table.repeat(batch, 1, 1),
    "tile": lambda table, batch: torch.tile(table, (batch, 1, 1)),
    "expand": lambda table, batch: table.expand(batch, -1, -1),
    "broadcast": lambda table, batch: table,
}


class Prompted(nn.Module):
    """Looks a prompt up once, and copies it to the batch."""

    def __init__(self, copy):
        super().__init__()
        self.prompt, self.linear, self.copy = nn.Embedding(5, 3), nn.Linear(3, 2), copy

    def forward(self, x):
        prompt = self.copy(self.prompt(torch.arange(4)[None]), len(x))  # (B, 4, 3) or (1, 4, 3)
        return self.linear((x * prompt).tanh()).flatten(1).sum(1)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("name", COPIES)
def test_a_look_up_that_is_copied_to_the_batch_is_exact_in_every_forward(name, passes):
    torch.manual_seed(0)
    model, x = Prompted(COPIES[name]).double(), torch.randn(5, 4, 3, dtype=torch.float64)

    def losses(model, batch):
        return model(batch)

    expected = [by_loop(model, x[:size], losses, max_grad_norm=1.0) for size in (5, 3, 5)]
    clipper = GhostClipper(model, max_grad_norm=1.0, passes=passes)
    for size, (norms, sums) in zip((5, 3, 5), expected, strict=True):
        model.zero_grad()
        torch.testing.assert_close(clipper.backward(model(x[:size])).detach(), norms, rtol=1e-9, atol=0)
        for name, total in sums.items():
            torch.testing.assert_close(model.get_parameter(name).grad, total, rtol=1e-9, atol=1e-12)


def test_nothing_stays_on_the_tensors_of_the_caller():
    model, x = Prompted(COPIES["repeat"]).double(), torch.randn(5, 4, 3, dtype=torch.float64)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    losses = model(x)
    clipper.backward(losses)
    assert not x.__dict__ and not losses.__dict__
