"""The RMSNorms of transformers take their own rule if their forward is in the allow-list, and none otherwise."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memsave.ghost import GhostClipper, rules
from memsave.ghost.rule import LayerInputs, registered_rule
from memsave.ghost.rules.norm_forwards import known_neutral_weight
from tests.ghost.test_layers import Head, draw, losses_of
from tests.support.per_example_reference import assert_exact, by_clipper, by_loop

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("device")
CLASS = re.compile(r"^class (\w*(?:RMSNorm|T5LayerNorm))\((?:torch\.)?nn\.Module\):\n(?:[ ].*\n|\n)+", re.MULTILINE)
IMPORTS = "from __future__ import annotations\nimport torch\nfrom torch import nn\n"  # imports change the bytecode
OTHERS = {  # of transformers 5.23: a gate, an input that is scaled before the norm, no trainable weight
    "AXK2GatedRMSNorm",
    "MuseSparkTextInputScaledRMSNorm",
    "DeepseekV4UnweightedRMSNorm",
    "EsmFold2RMSNorm",
    "FalconMambaWeightlessRMSNorm",
    "Glm5NextTextUnweightedRMSNorm",
    "HYV4UnweightedRMSNorm",
    "HrmTextRMSNorm",
    "Inkling2UnweightedRMSNorm",
    "NanoChatRMSNorm",
}


def kinds_in_transformers():
    """(name, class) of every RMSNorm of transformers, from its source: importing 200 modules takes minutes."""
    folder = Path(transformers.__file__).parent / "models"
    for path in sorted(folder.glob("*/modeling_*.py")):
        for match in CLASS.finditer(path.read_text(encoding="utf-8")):
            names = {"__name__": f"transformers.models.{path.parent.name}.{path.stem}"}
            exec(IMPORTS + match[0], names)
            yield match[1], names[match[1]]


def normed(kind, width=6):
    layer = kind(width)
    nn.init.normal_(layer.weight, 1, 0.3)
    return layer


def test_rmsnorms_of_transformers_are_in_the_allow_list_with_the_right_weight_or_are_known_others():
    x, found = draw(3, 6).float(), set()
    for name, kind in kinds_in_transformers():
        if name in OTHERS:
            continue
        layer, neutral = normed(kind), known_neutral_weight(kind(6))
        assert neutral is not None, f"{name} has a forward that is not in memsave/ghost/rules/norm_forwards.py"
        w = layer.weight.detach() + 1 - neutral
        torch.testing.assert_close(layer(x).detach(), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w)
        found.add(name)
    assert len(found) > 150


@pytest.mark.parametrize(
    "name", ["helium.Helium", "gemma3n.Gemma3n", "moshi.Moshi", "llama4.Llama4Text", "qwen4_exp.Qwen4ExpText"]
)
def test_further_forwards_of_the_allow_list_are_exact(name):
    package, prefix = name.split(".")
    modeling = pytest.importorskip(f"transformers.models.{package}.modeling_{package}")
    layer = normed(getattr(modeling, f"{prefix}RMSNorm"))
    assert_exact(Head(layer, before=nn.Linear(6, 6)).double(), draw(3, 5, 6), losses_of, rtol=1e-6)


def test_an_input_without_positions_and_one_given_by_name_have_the_rule():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    layer, (flat, deep) = normed(GemmaRMSNorm), (torch.randn(3, 6), torch.randn(3, 5, 6))
    options = {"batch_size": 3, "trainable": ("weight",), "name": "norm"}
    for args, kwargs in (((flat,), {}), ((deep,), {}), ((), {"x": deep})):
        found = rules.norm.hugging_face(layer, LayerInputs(args, kwargs, **options))
        assert found is not None and (found.args, found.kwargs) == (args, kwargs)
    assert rules.norm.hugging_face(layer, LayerInputs((deep,), {"gate": deep}, **options)) is None


def own_kind(forward, **others):
    """A class with this forward, named as if it belonged to transformers."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    names = {"__module__": "transformers.models.own.modeling_own", "forward": forward, **others}
    kind = type("OwnRMSNorm", (GemmaRMSNorm,), names)
    assert registered_rule(kind(6)) is rules.norm.hugging_face
    return kind


def squared(self, x):
    output = self._norm(x.float())
    output = output * (1.0 + self.weight.float()) ** 2
    return output.type_as(x)


def clipped_at_large_values(self, x):
    output = self._norm(x.float())
    output = output * (1.0 + self.weight.float().clamp(max=1e3))
    return output.type_as(x)


def norm_with_weight(self, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


@pytest.mark.parametrize("forward", [squared, clipped_at_large_values])
def test_a_forward_that_is_not_in_the_allow_list_has_no_rule(forward):
    layer = normed(own_kind(forward))
    assert known_neutral_weight(layer) is None
    assert_exact(Head(layer, before=nn.Linear(6, 6)).double(), draw(3, 5, 6), losses_of, rtol=1e-6)


def test_a_replaced_part_of_an_allowed_forward_has_no_rule():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    kind = own_kind(GemmaRMSNorm.forward, _norm=norm_with_weight)
    assert known_neutral_weight(kind(6)) is None
    assert_exact(Head(normed(kind), before=nn.Linear(6, 6)).double(), draw(3, 5, 6), losses_of, rtol=1e-6)
    layer = normed(GemmaRMSNorm)
    assert known_neutral_weight(layer) == 0
    layer._norm = lambda x: norm_with_weight(layer, x)
    assert known_neutral_weight(layer) is None


def test_an_allowed_forward_with_another_gradient_has_no_rule():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    eps = property(lambda self: self.weight.square().sum(), lambda self, value: None)
    layer = normed(own_kind(GemmaRMSNorm.forward, eps=eps))
    assert known_neutral_weight(layer) == 0  # of the forward alone
    assert_exact(Head(layer, before=nn.Linear(6, 6)).double(), draw(3, 5, 6), losses_of, rtol=1e-6)


@pytest.mark.parametrize(("of_input", "of_weight"), [("float64", "float32"), ("float32", "bfloat16")])
def test_inputs_wider_than_the_weight_are_exact(of_input, of_weight):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    layer, x = normed(LlamaRMSNorm).to(getattr(torch, of_weight)), draw(3, 5, 6).to(getattr(torch, of_input))
    norms, _ = by_loop(layer, x, losses_of, max_grad_norm=1.0)
    ours, _ = by_clipper(layer, x, losses_of, max_grad_norm=1.0)
    torch.testing.assert_close(ours, norms.to(ours.dtype), rtol=2e-2, atol=1e-6)


def test_a_first_batch_without_values_to_verify_is_verified_later():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    clipper = GhostClipper(model := Head(normed(GemmaRMSNorm)), max_grad_norm=1.0)
    verified = []
    for x in (torch.zeros(2, 5, 6), draw(2, 5, 6).float()):
        clipper.backward(model(x).sin().sum((1, 2)))
        verified.append(model.layer.forward.__self__.cache["verified"])
    assert verified == [False, True]


def test_the_verification_is_invisible_to_checkpoints():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def losses(model, x):
        y = checkpoint(model, x, use_reentrant=False)
        return y.sin().sum((1, 2)) * torch.arange(1, len(x) + 1)

    model, x = Head(normed(LlamaRMSNorm), before=nn.Linear(6, 6)).double(), draw(3, 5, 6)
    norms, _ = by_loop(model, x, losses, max_grad_norm=1.0)
    for passes in (1, 2):
        ours, _ = by_clipper(model, x, losses, max_grad_norm=1.0, passes=passes)
        torch.testing.assert_close(ours, norms, rtol=1e-6, atol=1e-9)
