"""`verify` finds padding that changes an example's gradient."""

import re

import pytest
import torch
from torch.nn import functional as F

from memsave.ghost import verify
from memsave.models.padding import numbered
from tests.ghost.test_transformers import gpt2
from tests.models.test_padding import losses_with, padded

pytestmark = pytest.mark.usefixtures("device")


def by_plain_loss(model, batch):
    """Without position ids; no target is predicted from padding."""
    scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:].masked_fill(batch["attention_mask"][:, :-1] == 0, -100)
    each = F.cross_entropy(scores.transpose(1, 2), targets, reduction="none")
    return each.sum(1) / (targets != -100).sum(1).clamp(min=1)


def from_padding(model, batch):
    """The first token of each is predicted from padding, too."""
    mask = batch["attention_mask"]
    scores = model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=numbered(mask)).logits[:, :-1]
    each = F.cross_entropy(scores.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    return each.sum(1) / (batch["labels"][:, 1:] != -100).sum(1).clamp(min=1)


@pytest.mark.parametrize(
    ("side", "losses", "found"),
    [
        ("left", by_plain_loss, True),
        ("left", from_padding, True),
        ("left", losses_with("chunked"), False),
        ("left", losses_with("logits"), False),
        ("right", by_plain_loss, False),
        ("right", losses_with("chunked"), False),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_padding_that_changes_a_gradient_is_found(side, losses, found, training):
    torch.manual_seed(0)
    batch = padded(side, (7, 7, 3))  # example 0 has none
    report = verify(gpt2().double().train(training), batch, losses)
    words = "example 2's gradient changes by .* without its padding, 4 of 7 columns: .*; give position_ids that do not"
    assert (re.search(words, str(report)) is not None) == found, report
    assert report.ok != found
    assert verify(gpt2().double(), padded(side, (5, 5, 5)), losses).ok
