"""`verify` finds errors, and does not change the model."""

from collections import UserDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memsave.ghost import GhostClipper, verify
from memsave.ghost.rules import linear
from tests.ghost.test_clipper import small
from tests.ghost.test_layers import draw, losses_of

pytestmark = pytest.mark.usefixtures("device")


def test_an_exact_model_is_reported_as_exact_and_not_changed():
    model = small()
    model(draw(2, 4)).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    report = verify(model, draw(4, 4), losses_of)
    assert report.ok, report
    assert "norms and clipped sums of 4 parameters agree" in str(report)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_a_gradient_that_is_zero_but_for_rounding_is_exact():
    """That of the bias of attention's keys, which adds the same to all scores of a query."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=30, num_labels=2, **sizes)
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    ids, labels = torch.randint(50, (8, 30)), torch.tensor([0, 1] * 4)

    def losses(model, batch):
        return F.cross_entropy(model(batch["ids"]).logits, batch["labels"], reduction="none")

    report = verify(model, {"ids": ids, "labels": labels}, losses)
    assert report.ok, report


def test_a_loss_that_mixes_examples_is_found():
    def mixed(model, batch):
        each = losses_of(model, batch)
        return each / each.detach().sum()

    report = verify(small(), draw(4, 4), mixed)
    assert not report.ok
    assert "batch-mates" in str(report)


def test_a_wrong_rule_is_found_by_parameter(monkeypatch):
    from memsave.ghost import gradients

    monkeypatch.setattr(linear, "upcast", lambda tensor: gradients.upcast(tensor) * 1.01)
    report = verify(small(), draw(4, 4), losses_of)
    assert any(finding.startswith("0.bias: the clipped sum is off") for finding in report.findings)
    assert any(finding.startswith("example 0: the clipper's norm is") for finding in report.findings)


def test_any_mapping_is_a_batch_and_other_things_are_refused():
    def mixed(model, batch):
        each = losses_of(model, batch["x"])
        return each / each.detach().sum()

    assert not verify(small(), UserDict(x=draw(4, 4)), mixed).ok
    with pytest.raises(TypeError, match="cannot exchange the examples of a object"):
        verify(small(), object(), lambda model, batch: losses_of(model, draw(4, 4)))
    model = small()
    GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="close it, then verify"):
        verify(model, draw(4, 4), losses_of)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_verify_accepts_float32_and_float64(dtype):
    torch.manual_seed(0)
    assert verify(
        nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype), draw(4, 8).to(dtype), losses_of
    ).ok


def test_a_loss_divided_by_a_count_over_the_batch_is_found():
    def by_tokens(model, batch):
        return model(batch["x"]).sin().sum((1, 2)) / batch["x"][..., 0].numel()

    report = verify(nn.Linear(4, 2).double(), {"x": draw(3, 5, 4)}, by_tokens)
    assert "when it is alone: the loss or a layer mixes examples" in str(report)


def test_refusals_of_the_clipper_are_findings():
    report = verify(nn.Linear(3, 2).double(), draw(4, 3), lambda m, b: losses_of(m, b) / losses_of(m, b).sum())
    assert "examples are not independent at the model" in str(report)


def test_tensors_of_the_batch_without_examples_are_not_exchanged():
    def weighted(model, batch):
        return (model(batch["x"]).sin() * batch["scale"]).sum(1)

    batch = {"x": draw(4, 4), "scale": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)}
    report = verify(small(), batch, weighted)
    assert report.ok, report


def test_a_batch_that_is_not_finite_is_a_finding():
    x = draw(4, 4)
    x[2] = float("inf")
    assert "not finite on this batch: give verify finite examples" in str(verify(small(), x, losses_of))


def test_an_example_without_a_gradient_is_no_finding():
    assert verify(nn.Linear(4, 2).double(), draw(4, 4), lambda m, b: m(b).sum(1) * torch.tensor([0.0, 1, 2, 3])).ok


def test_padding_is_removed_from_all_tensors_of_its_width():
    def losses(model, batch):
        kept = batch["attention_mask"][..., None].to(batch["x"].dtype)
        return (model(batch["x"]).sin() * kept).sum((1, 2)) + batch["scale"]

    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    batch = {"x": draw(4, 4, 4), "attention_mask": mask, "scale": torch.ones(4, dtype=torch.float64)}
    report = verify(nn.Linear(4, 2).double(), batch, losses)
    assert report.ok, report

    def by_columns(model, batch):
        return losses(model, batch) / batch["x"].shape[1]

    assert "example 1's gradient changes" in str(verify(nn.Linear(4, 2).double(), batch, by_columns))


def test_verify_refuses_a_replaced_forward():
    model = small()
    original = model[0].forward
    model[0].forward = lambda x: original(x)
    with pytest.raises(
        ValueError, match=r"the forward of 0 was replaced \(.*<lambda>\), and would call the original .* before that"
    ):
        verify(model, torch.randn(3, 4), losses_of)


def test_refusals_of_attach_are_findings_even_if_the_model_cannot_be_copied():
    model = nn.Sequential(nn.utils.prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5))
    assert "torch.nn.utils.prune computes" in str(verify(model, torch.randn(3, 4), losses_of))
