"""Ghost clipping in every memory mode of a model, for all parameters or a few, against one backward per example."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memsave.models import ReversibleUNet3d
from memsave.models.memory import MEMORY_MODES
from memsave.training.measure import get_memory, set_memory
from tests.ghost.test_transformers import gpt2, tokens
from tests.models.test_rev_gpt2 import losses_of, model_of
from tests.support.per_example_reference import assert_exact

peft = pytest.importorskip("peft")

BASES = {"gpt2": gpt2, "rev_gpt2": model_of}
ATTENTION = {"gpt2": {"target_modules": ["c_attn"], "fan_in_fan_out": True}, "rev_gpt2": {"target_modules": ["qkv"]}}
MODES = {"gpt2": ("stored", "checkpoint"), "rev_gpt2": MEMORY_MODES}
PAIRS = [(name, mode) for name, modes in MODES.items() for mode in modes]


def whole(name):
    model = BASES[name]()
    return model, model


def lora(name):
    """LoRA with random B: the initial B is zero, which gives A no gradient."""
    base = BASES[name]()
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, task_type="CAUSAL_LM", **ATTENTION[name]))
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.3)
    return model, base


def bitfit(name):
    model = BASES[name]()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key.endswith("bias"))
    return model, model


@pytest.mark.parametrize(("name", "mode"), PAIRS)
@pytest.mark.parametrize("trained", [whole, lora, bitfit])
def test_clipping_of_a_language_model_is_exact(name, mode, trained):
    torch.manual_seed(0)
    model, base = trained(name)
    set_memory(base, mode)
    assert get_memory(base) == mode
    model = model.double().train()
    if trained is not whole:
        assert 0 < sum(p.numel() for p in model.parameters() if p.requires_grad) < 2000
    assert_exact(model, tokens(), losses_of)


def patients(count):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(count, 2, 4, 5, 4, dtype=torch.float64, generator=generator)
    return {"image": image, "target": (torch.rand(count, 3, 4, 5, 4, generator=generator) < 0.3).double()}


def losses_of_patients(model, batch):
    each = F.binary_cross_entropy_with_logits(model(batch["image"]), batch["target"], reduction="none")
    return each.flatten(1).mean(1)


@pytest.mark.parametrize("mode", MEMORY_MODES)
@pytest.mark.parametrize(("count", "passes"), [(3, (1, 2)), (1, ("direct", 1, 2))], ids=["three", "one"])
def test_clipping_of_the_unet_is_exact(mode, count, passes):
    torch.manual_seed(0)
    net = ReversibleUNet3d(2, 3, channels=(4, 8), expansion=2, memory=mode).double()
    assert_exact(net, patients(count), losses_of_patients, passes=passes)
