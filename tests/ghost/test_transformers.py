"""Unmodified Hugging Face models from small random configs, against the loop in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.support.per_example_reference import assert_exact

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("device")

VOCABULARY, PAD = 31, 0
TINY = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {**TINY, "intermediate_size": 24, "max_position_embeddings": 32}


def tokens(*, batch=4, positions=7, dtype=torch.float64):
    """Ragged, right-padded, with repeated tokens; the last row is padding alone."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    ids = torch.randint(1, 6, (batch, positions), generator=generator)
    lengths = torch.tensor([positions, 3, 5, 0] * batch)[:batch]
    mask = torch.arange(positions)[None] < lengths[:, None]
    return {"input_ids": ids.masked_fill(~mask, PAD), "attention_mask": mask.long()}


def next_token_losses(model, batch):
    """The mean over each example's own target tokens; zero for an example that has none."""
    logits = model(**batch, use_cache=False).logits[:, :-1]
    targets, kept = batch["input_ids"][:, 1:], batch["attention_mask"][:, 1:].to(logits.dtype)
    each = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")  # (B, T)
    return (each * kept).sum(1) / kept.sum(1).clamp(min=1)


def class_losses(model, batch):
    logits = model(**batch).logits
    return F.cross_entropy(logits, torch.arange(len(logits)) % 2, reduction="none")


def gpt2(**options):
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **options))


def opt():
    sizes = {**TINY, "ffn_dim": 24, "max_position_embeddings": 32, "word_embed_proj_dim": 16, "pad_token_id": PAD}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**sizes))


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDE, num_key_value_heads=1, **options))


def bert(kind="Bert"):
    config = getattr(transformers, f"{kind}Config")(**{**WIDE, "pad_token_id": PAD}, num_labels=2)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config)


def albert():
    config = transformers.AlbertConfig(**WIDE, embedding_size=8, num_labels=2)
    return transformers.AlbertForSequenceClassification(config)


LANGUAGE = {
    "gpt2 tied": gpt2,
    "gpt2 untied": lambda: gpt2(tie_word_embeddings=False),
    "opt": opt,
    "llama": lambda: llama(tie_word_embeddings=False),
    "llama tied": lambda: llama(tie_word_embeddings=True),
}
CLASSIFIERS = {"bert": bert, "roberta": lambda: bert("Roberta"), "albert": albert}


def in_float64(model):
    """With the RMSNorms in float64, too: Llama's computes in float32 inside."""
    for module in model.modules():
        if type(module).__name__ in ("LlamaRMSNorm", "T5LayerNorm"):
            replacement = nn.RMSNorm(module.weight.shape[0], eps=module.variance_epsilon)
            module.__class__ = nn.RMSNorm
            module.__dict__.update({k: v for k, v in vars(replacement).items() if k not in vars(module)})
    return model.double()


@pytest.mark.parametrize("name", LANGUAGE)
@pytest.mark.parametrize("training", [True, False])
def test_language_models_are_exact(name, training):
    torch.manual_seed(0)
    model = in_float64(LANGUAGE[name]()).train(training)
    assert_exact(model, tokens(), next_token_losses)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_are_exact(name):
    torch.manual_seed(0)
    assert_exact(CLASSIFIERS[name]().double().train(), tokens(), class_losses)


def test_t5_with_its_shared_embedding_and_relative_bias_is_exact():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(**sizes, pad_token_id=PAD, decoder_start_token_id=PAD, dropout_rate=0.1)
    model = in_float64(transformers.T5ForConditionalGeneration(config)).train()

    def losses(model, batch):
        logits = model(**batch, decoder_input_ids=batch["input_ids"][:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none").mean(1)

    for batch in (4, 7):  # 7: as many examples as queries
        assert_exact(model, tokens(batch=batch), losses)


def test_a_vision_transformer_is_exact():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=2, num_labels=2)
    )
    images = {"pixel_values": torch.randn(3, 2, 8, 8, dtype=torch.float64)}
    assert_exact(model.double().train(), images, class_losses)


@pytest.mark.parametrize("positions", [4, 8])
def test_positions_of_one_row_are_exact_if_the_batch_divides_the_length(positions):
    torch.manual_seed(0)
    assert_exact(gpt2().double(), tokens(positions=positions), next_token_losses)


def test_gradient_checkpointing_is_exact():
    torch.manual_seed(0)
    model = gpt2().double().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_exact(model, tokens(), next_token_losses)
