"""Losses of encoder-decoders: normalised by example, exact under clipping, and the same without padding."""

import pytest
import torch
from torch.nn import functional as F

from memsave.ghost import verify
from memsave.models.encoder_decoder import encoder_decoder_losses, is_encoder_decoder
from memsave.models.language import IGNORED
from tests.ghost.test_transformers import in_float64
from tests.support.examples_alone import assert_exact_alone

transformers = pytest.importorskip("transformers")

VOCABULARY, PAD, END = 40, 0, 1


def t5(**options):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    ids = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD}
    return in_float64(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **ids, **options)))


def bart():
    parts = {"layers": 2, "attention_heads": 2, "ffn_dim": 24}
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in parts.items()}
    ids = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": END}
    config = transformers.BartConfig(**sizes, **ids, d_model=16, dropout=0.0, max_position_embeddings=32)
    return transformers.BartForConditionalGeneration(config).double()


MODELS = {"t5 tied": t5, "t5 untied": lambda: t5(tie_word_embeddings=False), "bart": bart}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().train()


def batch(*, inputs=(7, 3, 5), targets=(4, 6, 2)):
    """Three examples, padded on both sides of the model."""
    torch.manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (len(inputs), max(inputs)))
    labels = torch.randint(2, VOCABULARY, (len(targets), max(targets)))
    mask = torch.zeros_like(ids)
    for row, (count, length) in enumerate(zip(inputs, targets, strict=True)):
        mask[row, :count] = 1
        ids[row, count:] = PAD
        labels[row, length:] = IGNORED
    return {"input_ids": ids, "encoder_mask": mask, "labels": labels}


def losses_with(head):
    def losses(model, batch):
        options = {"attention_mask": batch["encoder_mask"], "head": head}
        return encoder_decoder_losses(model, batch["input_ids"], batch["labels"], **options)

    return losses


@pytest.mark.parametrize("head", ["chunked", "logits"])
def test_a_loss_is_that_of_the_example_alone_without_padding(model, head):
    whole = batch()
    losses = losses_with(head)(model, whole)
    for row in range(3):
        ids = whole["input_ids"][row][whole["encoder_mask"][row] != 0][None]
        labels = whole["labels"][row][whole["labels"][row] != IGNORED][None]
        expected = F.cross_entropy(model(input_ids=ids, labels=labels).logits[0], labels[0])
        torch.testing.assert_close(losses[row], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("head", ["chunked", "logits"])
def test_norms_and_clipped_sums_are_exact(model, head):
    assert_exact_alone(model, batch(), losses_with(head))
    report = verify(model, batch(inputs=(6, 3, 5)), losses_with(head))  # as many input as target columns
    assert report.ok, report


def test_an_example_without_targets_has_loss_zero(model):
    whole = batch()
    whole["labels"][1] = IGNORED
    assert losses_with("logits")(model, whole)[1] == 0


def test_a_model_that_sees_padding_is_refused(model):
    encoder = model.get_encoder()
    forward = encoder.forward
    encoder.forward = lambda *args, **kwargs: forward(*args, **{**kwargs, "attention_mask": None})
    with pytest.raises(ValueError, match=r"padding of the encoder's input changes the logits of .*; make"):
        losses_with("logits")(model, batch())


def test_a_bias_of_the_logits_that_is_not_zero_needs_the_logits():
    torch.manual_seed(0)
    model = bart()
    losses_with("chunked")(model, batch())
    model.final_logits_bias[0, 3] = 1.0
    with pytest.raises(ValueError, match=r'give head="logits"'):
        losses_with("chunked")(model, batch())
    assert losses_with("logits")(model, batch()).isfinite().all()


def test_only_models_with_two_parts_are_encoder_decoders(model):
    assert is_encoder_decoder(model)
    assert not is_encoder_decoder(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=4, n_head=1)))
    with pytest.raises(ValueError, match="choose one of chunked, logits"):
        losses_with("other")(model, batch())
