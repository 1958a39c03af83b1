"""Loss, norm and clipped gradient of a padded example equal those of the unpadded one."""

import copy

import pytest
import torch
from torch import nn

from memsave.ghost import GhostClipper
from memsave.models.language import causal_lm_losses
from tests.ghost.test_transformers import PAD, TINY, VOCABULARY, gpt2, in_float64, llama, opt
from tests.models.test_language import gemma3, gptj, of
from tests.support.per_example_reference import by_clipper

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("device")

MODELS = {
    "gpt2": gpt2,
    "gpt2 untied": lambda: gpt2(tie_word_embeddings=False),
    "llama": llama,
    "opt": opt,
    "gpt-neox": lambda: of("GPTNeoX"),
    "gpt-j": gptj,
    "qwen 2": lambda: of("Qwen2", num_key_value_heads=1),
    "gemma 3, capped": lambda: gemma3(final_logit_softcapping=0.2),
}
ROUNDED = ("qwen 2", "gemma 3, capped", "gpt-j")  # their norms or rotations compute in float32
LENGTHS = (5, 9, 2, 12)


def padded(side, lengths=LENGTHS):
    """A batch of different lengths, whose padding consists of valid tokens."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    column, length = torch.arange(max(lengths))[None], torch.tensor(lengths)[:, None]
    kept = column < length if side == "right" else column >= max(lengths) - length
    labels = ids.masked_fill(~kept, -100)
    return {"input_ids": ids, "attention_mask": kept.long(), "labels": labels}


def alone(batch, row):
    kept = batch["attention_mask"][row] != 0
    return {key: value[row : row + 1, kept] for key, value in batch.items()}


def losses_with(head):
    return lambda model, batch: causal_lm_losses(
        model, batch["input_ids"], batch["labels"], attention_mask=batch["attention_mask"], head=head
    )


def gradient(model, loss):
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def assert_as_alone(model, batch, *, head, rtol=1e-9, passes=(1, 2)):
    losses = losses_with(head)
    each = [losses(model, alone(batch, row)) for row in range(len(batch["labels"]))]
    torch.testing.assert_close(losses(model, batch), torch.cat(each), rtol=rtol, atol=0)
    gradients = [gradient(model, loss.sum()) for loss in each]
    norms = torch.stack([torch.stack([g.square().sum() for g in one]).sum().sqrt() for one in gradients])
    bound = norms.median().item()
    factors = (bound / norms).clamp(max=1.0)
    for number in passes:
        ours, sums = by_clipper(model, batch, losses, max_grad_norm=bound, passes=number)
        torch.testing.assert_close(ours, norms, rtol=rtol, atol=1e-12)
        for number, total in enumerate(sums.values()):
            expected = sum(c * one[number] for c, one in zip(factors, gradients, strict=True))
            assert (total - expected).norm() <= rtol * expected.norm() + (1e-7 if rtol > 1e-6 else 1e-12) * bound


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("head", "side"),
    [
        ("chunked", "left"),
        ("logits", "right"),
        pytest.param("chunked", "right", marks=pytest.mark.slow),
        pytest.param("logits", "left", marks=pytest.mark.slow),
    ],
)
def test_a_padded_example_equals_the_unpadded_one(name, side, head):
    torch.manual_seed(0)
    model = in_float64(MODELS[name]()).eval()
    assert_as_alone(model, padded(side), head=head, rtol=1e-5 if name in ROUNDED else 1e-9)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("head", ["chunked", "logits"])
def test_a_padded_example_equals_the_unpadded_one_for_gemma_2_in_float32(side, head):
    """In float64 the attention of Gemma 2 is NaN for a token without keys."""
    torch.manual_seed(0)
    model = of("Gemma2", num_key_value_heads=1, head_dim=8).eval()
    batch, losses = padded(side), losses_with(head)
    each = torch.cat([losses(model, alone(batch, row)) for row in range(len(LENGTHS))])
    torch.testing.assert_close(losses(model, batch), each, rtol=1e-5, atol=0)
    if side == "left":
        with pytest.raises(ValueError, match=r"changes the logits of Gemma2ForCausalLM by nan.*pad on the right"):
            losses(copy.deepcopy(model).double(), batch)


@pytest.mark.parametrize("longest", [6, 9, 20])
def test_the_length_of_other_examples_has_no_effect(longest):
    torch.manual_seed(0)
    model = gpt2().double().eval()
    for side in ("left", "right"):
        assert_as_alone(model, padded(side, (6, longest)), head="chunked")


@pytest.mark.parametrize("head", ["chunked", "logits"])
def test_the_first_token_after_padding_is_no_target(head):
    """It would be predicted from padding."""
    torch.manual_seed(0)
    model, batch, losses = gpt2().double().eval(), padded("left"), losses_with(head)
    everything = {**batch, "labels": batch["input_ids"]}
    torch.testing.assert_close(losses(model, everything), losses(model, batch), rtol=1e-12, atol=0)


@pytest.mark.parametrize("head", ["chunked", "logits"])
def test_a_target_at_padding_is_refused(head):
    model, batch = gpt2(), padded("right")
    batch["labels"] = batch["input_ids"]
    words = rf"the target {batch['labels'][0, 5]} at row 0, column 5, where attention_mask is 0; give -100 there"
    with pytest.raises(ValueError, match=words):
        losses_with(head)(model, batch)


def test_an_example_of_only_padding_needs_no_position_ids():
    torch.manual_seed(0)
    model = of("Bloom", n_head=2, n_layer=2).double().eval()
    batch = padded("right", (4, 0, 6))
    assert losses_with("chunked")(model, batch)[1] == 0
    both = padded("left", (4, 0, 6))
    assert losses_with("chunked")(gpt2().double().eval(), both)[1] == 0


def test_without_padding_no_position_ids_are_given():
    torch.manual_seed(0)
    model = gpt2().eval()
    seen = []
    model.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
    )
    losses_with("chunked")(model, padded("right"))
    assert seen[-1] is None
    losses_with("chunked")(model, padded("left"))
    assert seen[-1][0].tolist() == [0] * 7 + [0, 1, 2, 3, 4]


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_trial_is_no_longer_than_the_batch(side):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": max(LENGTHS)}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).double().eval()
    assert_as_alone(model, padded(side), head="chunked", passes=(1,))


def roberta(kind):
    config = getattr(transformers, f"{kind}Config")(**TINY, intermediate_size=24, is_decoder=True, pad_token_id=PAD)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def recurrent_gemma():
    sizes = {**TINY, "lru_width": 16, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 24}
    return transformers.RecurrentGemmaForCausalLM(transformers.RecurrentGemmaConfig(**sizes, pad_token_id=PAD))


def cpm_ant():
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_attention_heads": 2, "dim_head": 8, "dim_ff": 24}
    return transformers.CpmAntForCausalLM(transformers.CpmAntConfig(**sizes, num_hidden_layers=2))


REFUSED = {  # name: (model, side, words)
    "no positions": (lambda: of("Bloom", n_head=2, n_layer=2), "left", "BloomForCausalLM takes no position_ids"),
    "positions from another number": (lambda: roberta("Roberta"), "left", "changes the logits of RobertaForCausalLM"),
    "convolutions": (recurrent_gemma, "left", "changes the logits of RecurrentGemmaForCausalLM"),
    "padding that is looked at": (cpm_ant, "right", "changes the logits of CpmAntForCausalLM"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("head", ["chunked", "logits"])
def test_a_model_whose_logits_depend_on_padding_is_refused(name, head):
    torch.manual_seed(0)
    make, side, words = REFUSED[name]
    remedy = "pad on the right" if side == "left" else "make batches of examples of one length"
    model = make().eval()
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{words}.*; {remedy}"):
            losses_with(head)(model, padded(side))


def test_invalid_masks_are_refused():
    model, batch = gpt2(), padded("left")
    batch["attention_mask"][3, 2] = 0
    with pytest.raises(ValueError, match=r"zeros on the left, and between ones in row 3; pad on the right"):
        losses_with("chunked")(model, batch)
    batch["attention_mask"] = torch.ones(4, 1, 12, 12)
    with pytest.raises(ValueError, match=r"attention_mask is \(4, 1, 12, 12\), input_ids \(4, 12\); give \(B, T\)"):
        losses_with("chunked")(model, batch)


@pytest.mark.parametrize("head", ["chunked", "logits"])
def test_lora_with_left_padding_is_exact(head):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(gpt2(), peft.LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    causal = peft.PeftModelForCausalLM(gpt2(), peft.LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True))
    for each in (model, causal):
        assert_as_alone(each.double().eval(), padded("left"), head=head)


@pytest.mark.parametrize("head", ["chunked", "logits"])
def test_a_learned_prefix_with_left_padding_is_exact(head):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model, batch = peft.get_peft_model(gpt2(), config).double().eval(), padded("left")
    each = [losses_with(head)(model, alone(batch, row)) for row in range(4)]
    torch.testing.assert_close(losses_with(head)(model, batch), torch.cat(each), rtol=1e-9, atol=0)


def test_the_trial_changes_no_state_of_a_clipper():
    torch.manual_seed(0)
    model, batch, calls = gpt2().train(), padded("left"), []
    model.transformer.h[0].register_forward_pre_hook(lambda module, args: calls.append(module.training))
    clipper = GhostClipper(model, max_grad_norm=1.0)
    found = []
    for count in (4, 1):  # the head, with padding, without padding, and the step itself
        calls.clear()
        torch.manual_seed(7)
        found.append(losses_with("chunked")(model, batch))
        clipper.backward(found[-1])
        assert calls == [False] * (count - 1) + [True]
    assert torch.equal(*found)
    clipper.close()
