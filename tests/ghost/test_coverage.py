"""`coverage` against what a clipper does with the same model, and the state that it leaves."""

import random

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from memsave.ghost import GhostClipper, coverage, linear_cross_entropy
from memsave.ghost.coverage import _by_parameter
from memsave.ghost.coverage_report import _format_bytes
from memsave.ghost.refusals import Refusal, Refused


class Block(nn.Module):
    """A layer of each kind, and a parameter beside children."""

    def __init__(self, width=8):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x + self.mix(self.norm(x)) * self.scale


class Text(nn.Module):
    """An embedding that is also the head."""

    def __init__(self, vocabulary=200, width=8, layers=3):
        super().__init__()
        self.look, self.layers = nn.Embedding(vocabulary, width), nn.Sequential(*(Block(width) for _ in range(layers)))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.look.weight

    def forward(self, ids):
        return self.head(self.layers(self.look(ids)))


class Doubled(torch.autograd.Function):
    """A product that no operator of PyTorch computes."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad * weight, (grad * x).sum((0, 1))


class Outside(nn.Module):
    """Uses a parameter in a function that is not followed."""

    def __init__(self):
        super().__init__()
        self.mix, self.weight = nn.Linear(8, 8), nn.Parameter(torch.ones(8))

    def forward(self, x):
        return Doubled.apply(self.mix(x), self.weight)


def test_a_refused_module_refuses_its_own_parameters_or_else_all_inside_it():
    model = nn.Sequential(Outside(), nn.Linear(8, 8))
    owners = {p: [(name, model)] for name, p in model.named_parameters()}
    own = _by_parameter(model, owners, [Refusal("0", "Outside", "is not followed", "")])
    assert set(own) == {model[0].weight}
    inside = _by_parameter(model, owners, [Refusal("0.mix", "", "is not followed", ""), Refusal("1", "", "", "")])
    assert set(inside) == {*model[0].mix.parameters(), *model[1].parameters()}


@pytest.mark.parametrize(
    ("count", "text"), [(1023, "1023 B"), (1536, "1.50 KiB"), (5 << 19, "2.50 MiB"), (3 << 30, "3.00 GiB")]
)
def test_bytes_are_formatted_in_binary_units(count, text):
    assert _format_bytes(count) == text


class Counting(nn.Module):
    """Draws random numbers and changes a buffer."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x):
        random.random()
        self.seen += 1
        return F.dropout(self.mix(x), 0.5)


def ids(examples=3):
    return torch.arange(examples * 5).view(examples, 5)


def rows_of(report):
    return {each.name: each for each in report.parameters}


def test_a_forward_shows_rules_operators_forms_and_bytes():
    report = coverage(Text(), ids())
    rows = rows_of(report)
    assert report.ok and report.forward_ran and {each.verdict for each in report.parameters} == {"exact"}
    assert rows["look.weight"].aliases == ("head.weight",)
    assert rows["look.weight"].used_by == ("Embedding", "Linear")
    assert rows["look.weight"].form == "Gram matrix + look-up"
    assert rows["look.weight"].bytes_per_example == 5 * (8 * 4 + 8) + 5 * (8 + 200) * 4
    assert rows["layers.0.scale"].used_by == ("mul",) and rows["layers.0.scale"].layer == "Block"
    assert rows["layers.0.norm.weight"].used_by == ("LayerNorm",)
    assert rows["layers.0.norm.weight"].bytes_per_example == 8 * 4
    assert report.bytes_per_example == sum(each.bytes_per_example for each in report.parameters)


@pytest.mark.parametrize("places", [2, 5, 90])
def test_forms_and_bytes_are_those_of_a_backward(places):
    model, batch = Text(), torch.randint(200, (3, places))
    report = coverage(model, batch)
    clipper = GhostClipper(model, max_grad_norm=0.1, passes=1)
    clipper.backward(model(batch).square().mean((1, 2)))
    planned = {}
    for name, (form, kept) in clipper.plan.items():
        planned[name] = (form == "gradients formed", kept // 3)
    for name, row in rows_of(report).items():
        if row.shape == (8, 8):
            assert (row.form == "formed gradient", row.bytes_per_example) == planned[name]
    tied = rows_of(report)["look.weight"]
    assert tied.bytes_per_example == planned["look.weight"][1] + planned["head.weight"][1]


def test_meta_and_fake_tensors_give_the_same_report():
    expected = coverage(Text(), ids())
    with torch.device("meta"):
        model = Text()
    assert coverage(model, ids().to("meta")) == expected
    with FakeTensorMode():
        assert coverage(Text(), ids()) == expected


def test_without_a_batch_the_classes_of_the_layers_decide():
    report = coverage(Text())
    rows = rows_of(report)
    assert report.ok and not report.forward_ran and report.bytes_per_example is None
    assert rows["look.weight"].used_by == ("Embedding", "Linear")
    assert rows["layers.0.scale"].used_by == ("operators",) and "followed" in rows["layers.0.scale"].why
    assert "no forward ran" in str(report)


def test_equal_rows_of_repeated_layers_are_one_line_of_the_table():
    lines = str(coverage(Text(), ids())).splitlines()
    assert any(line.startswith("layers.*.mix.weight x 3  ") for line in lines)
    assert any(line.startswith("look.weight = head.weight  ") for line in lines)
    assert len({line.index("exact") for line in lines[1:6]}) == 1
    assert any("exact" in line and "16 parameters" in line and "1,888 elements" in line for line in lines)


def test_only_trainable_parameters_are_listed():
    model = Text()
    model.layers.requires_grad_(False)
    assert list(rows_of(coverage(model, ids()))) == ["look.weight"]


def test_a_refused_layer_has_its_reason_and_its_remedy():
    model = nn.Sequential(nn.Embedding(20, 8, scale_grad_by_freq=True), nn.Linear(8, 8))
    report = coverage(model, ids() % 20)
    row, after = rows_of(report)["0.weight"], rows_of(report)["1.weight"]
    assert (row.verdict, row.remedy) == ("refused", "construct it without these") and "max_norm" in row.why
    assert after.verdict == "exact" and not report.ok
    assert "\n- 0 (Embedding) has max_norm" in str(report)


def test_what_is_refused_before_a_forward_is_reported_without_one():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    report = coverage(model, torch.ones(3, 8))
    assert not report.ok and not report.forward_ran
    assert [name for name, row in rows_of(report).items() if row.verdict == "refused"] == ["1.weight", "1.bias"]
    assert "GroupNorm" in rows_of(report)["1.weight"].remedy


def test_an_attached_clipper_is_refused_for_all_its_parameters():
    model = Text()
    clipper = GhostClipper(model, max_grad_norm=0.1)
    assert {each.verdict for each in coverage(model, ids()).parameters} == {"refused"}
    clipper.close()
    assert coverage(model, ids()).ok


def test_a_parameter_that_passes_no_norm_hook_is_refused_as_in_a_backward():
    model, batch = Outside(), torch.ones(3, 4, 8)
    report = coverage(model, batch)
    assert {name: row.verdict for name, row in rows_of(report).items()} == {
        "weight": "refused",
        "mix.weight": "exact",
        "mix.bias": "exact",
    }
    assert [each.name for each in report.refusals] == ["weight"]
    clipper = GhostClipper(model, max_grad_norm=0.1)
    with pytest.raises(ValueError, match="weight has a gradient that passed no norm hook"):
        clipper.backward(model(batch).sum((1, 2)))


def test_a_parameter_that_the_forward_does_not_use_is_unused():
    model = Text()
    report = coverage(model, ids(), forward=lambda model, batch: model(batch))
    assert not report.with_verdict("unused")
    model.layers[1].forward = lambda x: x
    report = coverage(model, ids())
    assert report.ok and {each.name.rpartition(".")[0] for each in report.with_verdict("unused")} == {
        "layers.1",
        "layers.1.norm",
        "layers.1.mix",
    }


def test_a_forward_may_compute_losses():
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8))
    head = model[0].weight

    def losses(model, batch):
        return linear_cross_entropy(model(batch), head, batch).mean(1)

    assert len(coverage(model, ids(), forward=losses).parameters) == 3
    assert "linear_cross_entropy" in " ".join(rows_of(coverage(model, ids(), forward=losses))["0.weight"].used_by)


@pytest.mark.parametrize("batch", [{"x": torch.ones(3, 8)}, [torch.ones(3, 8)], torch.ones(3, 8)], ids=type)
def test_a_batch_may_be_a_mapping_a_sequence_or_a_tensor(batch):
    class Named(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    assert coverage(Named(8, 8), batch).ok


def test_model_gradients_buffers_and_random_state_are_as_before():
    model = Counting()
    model.mix.weight.grad = torch.full((8, 8), 2.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    buffer, state, ours = model.seen, random.getstate(), torch.get_rng_state()
    report = coverage(model, torch.ones(3, 8))
    assert [each.name for each in report.refusals] == ["seen"] and not report.ok
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.seen is buffer and torch.equal(model.mix.weight.grad, torch.full((8, 8), 2.0))
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), ours)
    assert "forward" not in vars(model.mix) and not model._forward_hooks and not model._forward_pre_hooks
    assert model.mix.weight.requires_grad and model.training


def test_an_error_of_the_forward_is_raised_and_the_model_restored():
    model = Text()
    with pytest.raises(IndexError):
        coverage(model, ids() + 300)
    assert "forward" not in vars(model.head)
    assert coverage(model, ids()).ok


def test_the_error_of_a_clipper_has_the_refusals_one_by_one():
    model = nn.Sequential(nn.BatchNorm1d(8), nn.InstanceNorm1d(8, track_running_stats=True))
    with pytest.raises(Refused) as error:
        GhostClipper(model, max_grad_norm=0.1)
    assert [each.name for each in error.value.refusals] == ["0", "1"]
    assert all(each.remedy in str(error.value) for each in error.value.refusals)


def test_values_of_json():
    found = coverage(Text(), ids()).as_dict()
    assert found["ok"] and found["parameters"][0]["name"] == "look.weight"
    assert found["parameters"][0]["elements"] == 1600 and found["parameters"][0]["dtype"] == "float32"
