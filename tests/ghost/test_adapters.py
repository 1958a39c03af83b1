"""Parameter-efficient fine-tuning of unmodified models: the adapters, or the biases, are clipped exactly."""

import pytest
import torch
from torch import nn

from tests.ghost.test_transformers import bert, class_losses, gpt2, in_float64, llama, next_token_losses, tokens
from tests.support.per_example_reference import assert_exact

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("device")


def with_lora(model, *, task, **options):
    """LoRA of rank 3 with dropout, trained a little: its B starts at zero, where A has no gradient."""
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_dropout=0.1, task_type=task, **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.train()


def trainable(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_lora_on_gpt2_is_exact():
    torch.manual_seed(0)
    model = with_lora(gpt2(), task="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True).double()
    assert len(trainable(model)) == 4  # A and B of two layers
    assert_exact(model, tokens(), next_token_losses)


def test_lora_on_gpt2_under_gradient_checkpointing_is_exact():
    torch.manual_seed(0)
    model = with_lora(gpt2(), task="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True).double()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_exact(model, tokens(), next_token_losses)


def test_lora_on_llama_is_exact():
    torch.manual_seed(0)
    model = with_lora(in_float64(llama()), task="CAUSAL_LM", target_modules=["q_proj", "v_proj", "down_proj"]).double()
    assert_exact(model, tokens(), next_token_losses)


def test_lora_on_bert_with_its_classifier_is_exact():
    torch.manual_seed(0)
    model = with_lora(bert(), task="SEQ_CLS", target_modules=["query", "value"]).double()
    assert any("classifier" in name for name in trainable(model))
    assert_exact(model, tokens(), class_losses)


def test_bitfit_on_bert_is_exact():
    torch.manual_seed(0)
    model = bert().double().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    assert all(name.endswith("bias") for name in trainable(model))
    assert_exact(model, tokens(), class_losses)
