"""The loss of each example is the one that the model returns for it alone, and the clipper is exact for it."""

import pytest
import torch

from memsave.ghost import verify
from memsave.models.model_losses import model_losses
from tests.ghost.test_transformers import PAD, VOCABULARY, WIDE, gpt2, in_float64, llama
from tests.models.test_encoder_decoder import bart, t5

transformers = pytest.importorskip("transformers")

LENGTHS, LABELS = (7, 3, 5), 3


def made(family, head, **options):
    config = getattr(transformers, f"{family}Config")(**{**WIDE, "pad_token_id": PAD, "num_labels": LABELS, **options})
    return getattr(transformers, f"{family}{head}")(config)


def distilbert(head, num_labels=LABELS):
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=16,
        n_layers=2,
        n_heads=2,
        hidden_dim=24,
        max_position_embeddings=32,
        num_labels=num_labels,
    )
    return getattr(transformers, f"DistilBert{head}")(config)


def vit():
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, intermediate_size=24, num_labels=LABELS)
    )


def small_gpt2(**options):
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "pad_token_id": PAD}
    return transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**sizes, num_labels=LABELS, **options))


def adapted():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"]))


def text(*labels, side="right"):
    """Three padded texts; `labels` of each, or "tokens"."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=generator)
    column, length = torch.arange(max(LENGTHS))[None], torch.tensor(LENGTHS)[:, None]
    kept = column < length if side == "right" else column >= max(LENGTHS) - length
    found = {"input_ids": ids.masked_fill(~kept, PAD), "attention_mask": kept.long()}
    if not labels:
        return {**found, "labels": ids.masked_fill(~kept, -100)}
    return {**found, "labels": torch.tensor(labels)}


def of_tokens():
    batch = text()
    labels = (batch["input_ids"] % LABELS).masked_fill(
        (batch["attention_mask"] == 0) | (torch.arange(7) % 3 == 1), -100
    )
    return {**batch, "labels": labels}


def masked():
    batch = text()
    return {**batch, "labels": batch["labels"].masked_fill(torch.arange(7) % 2 == 1, -100)}


def answers():
    batch = text()
    del batch["labels"]
    return {**batch, "start_positions": torch.tensor([1, 0, 3]), "end_positions": torch.tensor([4, 2, 4])}


def choices():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (3, 2, 5), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 1])}


def images():
    pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.tensor([0, 2, 1])}


def pairs():
    """DataCollatorForSeq2Seq adds decoder_input_ids if it knows the model."""
    batch = text(side="right")
    return {**batch, "labels": batch["labels"][:, :5]}


CASES = {
    "gpt2": (gpt2, text),
    "gpt2, left": (gpt2, lambda: text(side="left")),
    "gpt2, lora": (adapted, text),
    "llama": (llama, text),
    "llama, token types": (gpt2, lambda: {**text(), "token_type_ids": torch.zeros(3, 7, dtype=torch.long)}),
    "t5": (t5, pairs),
    "bart": (bart, pairs),
    "bert, masked": (lambda: made("Bert", "ForMaskedLM"), masked),
    "roberta, masked": (lambda: made("Roberta", "ForMaskedLM"), masked),
    "bert, classes": (lambda: made("Bert", "ForSequenceClassification"), lambda: text(0, 2, 1)),
    "bert, regression": (
        lambda: made("Bert", "ForSequenceClassification", num_labels=1), lambda: text(0.5, -1.0, 2.0)
    ),
    "bert, several regressions": (
        lambda: made("Bert", "ForSequenceClassification", problem_type="regression"),
        lambda: text([0.5, 1.0, 2.0], [-1.0, 0.0, 0.0], [2.0, 1.0, 1.0]),
    ),
    "bert, several labels": (
        lambda: made("Bert", "ForSequenceClassification"), lambda: text([0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0] * 3)
    ),
    "distilbert, classes": (lambda: distilbert("ForSequenceClassification"), lambda: text(0, 2, 1)),
    "gpt2, classes": (small_gpt2, lambda: text(0, 2, 1)),
    "gpt2, classes, left": (small_gpt2, lambda: text(0, 2, 1, side="left")),
    "llama, classes, left": (
        lambda: made("Llama", "ForSequenceClassification"), lambda: text(0, 2, 1, side="left")
    ),
    "bert, tokens": (lambda: made("Bert", "ForTokenClassification"), of_tokens),
    "distilbert, answers": (lambda: distilbert("ForQuestionAnswering", num_labels=2), answers),
    "bert, answers": (lambda: made("Bert", "ForQuestionAnswering", num_labels=2), answers),
    "bert, choices": (lambda: made("Bert", "ForMultipleChoice"), choices),
    "vit": (vit, images),
}  # fmt: skip


def alone(name, batch, row):
    """The example without its padding, where the model sees its labels as transformers does."""
    kept = batch["attention_mask"][row] != 0 if "attention_mask" in batch else None
    found = {}
    for key, value in batch.items():
        value = value[row : row + 1]
        of_input = kept is not None and kept.dim() == 1 and value.shape[1:] == kept.shape
        found[key] = value[:, kept] if of_input else value
    if "t5" in name or "bart" in name:
        found["labels"] = found["labels"][:, found["labels"][0] != -100]
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_loss_of_an_example_is_what_the_model_returns_for_it_alone(name):
    torch.manual_seed(0)
    make, batch = CASES[name]
    model, batch = in_float64(make()).double().eval(), batch()
    losses = model_losses(model, batch)
    assert losses.shape == (3,)
    for row, loss in enumerate(losses):
        own = model(**alone(name, batch, row)).loss
        torch.testing.assert_close(loss, own.to(loss.dtype), rtol=1e-6, atol=1e-7)  # transformers computes in float32


@pytest.mark.parametrize("name", CASES)
def test_the_clipper_is_exact_for_it(name):
    torch.manual_seed(0)
    make, batch = CASES[name]
    model = in_float64(make()).double().eval()
    report = verify(model, batch(), model_losses)
    assert report.ok, report


def test_an_answer_outside_of_the_text_is_no_target():
    model = made("Bert", "ForQuestionAnswering", num_labels=2).double().eval()
    batch = {**answers(), "end_positions": torch.tensor([4, 50, 50]), "start_positions": torch.tensor([1, 0, 50])}
    losses = model_losses(model, batch)
    assert losses[2] == 0 and 0 < losses[1] < losses[0]


def experts():
    config = {**WIDE, "num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**config, num_key_value_heads=1))


REFUSED = {
    "no labels": (gpt2, lambda: {"input_ids": text()["input_ids"]}, "the batch has no labels, only input_ids"),
    "no answers": (lambda: made("Bert", "ForQuestionAnswering", num_labels=2), text, "no start_positions and no end_"),
    "another head": (lambda: made("Bert", "ForPreTraining"), text, "loss of each example of BertForPreTraining is not"),
    "a loss over the experts": (experts, text, "all examples of the batch share"),
    "a head that reads the first column": (
        lambda: made("Bert", "ForSequenceClassification"), lambda: text(0, 2, 1, side="left"), None
    ),
    "another input": (t5, lambda: {**pairs(), "decoder_attention_mask": torch.ones(3, 5)}, "decoder_attention_mask"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused(name):
    make, batch, sentence = REFUSED[name]
    model = make().double().eval()
    with pytest.raises(ValueError, match=sentence):
        model_losses(model, batch())
