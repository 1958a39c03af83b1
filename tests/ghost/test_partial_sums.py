"""A backward that fails while it adds to `.grad`: a retry must not count examples twice."""

import pytest
import torch
from torch import nn

from memsave.ghost import GhostClipper, direct, ledger
from tests.ghost.test_layers import draw, losses_of
from tests.ghost.test_recomputation import Checkpointed

pytestmark = pytest.mark.usefixtures("device")

OPTIONS = [
    {"passes": 1},
    {"passes": 2},
    {"passes": "direct"},
    {"clipping": "per_layer"},
]


def out_of_memory_after(monkeypatch, count):
    """Let the sum of one parameter fail, after `count` successful sums."""
    add_sum, calls = ledger.add_sum, []

    def failing(*args):
        calls.append(args)
        if len(calls) == count + 1:
            raise torch.OutOfMemoryError("out of memory")
        add_sum(*args)

    monkeypatch.setattr(ledger, "add_sum", failing)
    monkeypatch.setattr(direct, "add_sum", failing)


def model_and_batch(options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return model, draw(1 if options.get("passes") == "direct" else 5, 4)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_retry_is_refused_until_the_gradients_are_cleared(options, monkeypatch):
    model, batch = model_and_batch(options)
    clip = GhostClipper(model, max_grad_norm=0.1, **options)
    clip.backward(losses_of(model, batch))
    right = [p.grad.clone() for p in model.parameters()]
    for set_to_none in (True, False):
        model.zero_grad(set_to_none=set_to_none)
        with monkeypatch.context() as patch:
            out_of_memory_after(patch, 2)
            with pytest.raises(torch.OutOfMemoryError):
                clip.backward(losses_of(model, batch))
        assert clip.unfinished
        for losses in (losses_of(model, batch), losses_of(model, batch)[:0]):
            with pytest.raises(ValueError, match=r"clear the gradients .* begin the logical batch again") as refusal:
                clip.backward(losses)
        assert "out of memory" not in str(refusal.value)  # callers retry when they find these words
        model.zero_grad(set_to_none=set_to_none)
        assert not clip.unfinished
        clip.backward(losses_of(model, batch))
        for p, expected in zip(model.parameters(), right, strict=True):
            torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=0)


def test_a_failure_before_the_sums_may_be_retried(monkeypatch):
    model = Checkpointed().double()
    clip = GhostClipper(model, max_grad_norm=0.1, passes=2)

    def failing(*_):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(ledger.Ledger, "add", failing)
        with pytest.raises(torch.OutOfMemoryError):
            clip.backward(losses_of(model, draw(3, 4)))
    assert not clip.unfinished
    clip.backward(losses_of(model, draw(3, 4)))
