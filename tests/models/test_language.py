"""The chunked losses of causal language models, compared with those of their logits in float64."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memsave.ghost import GhostClipper, logits, verify
from memsave.models.language import causal_lm_losses, fuse_gelu
from tests.ghost.test_transformers import LANGUAGE, PAD, VOCABULARY, WIDE, gpt2, in_float64, tokens
from tests.support.per_example_reference import by_clipper, by_loop

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("device")


def of(kind, **options):
    config = getattr(transformers, f"{kind}Config")(**{**WIDE, "pad_token_id": PAD, **options})
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def gptj():
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4}
    return transformers.GPTJForCausalLM(transformers.GPTJConfig(**sizes))


def gemma3(**options):
    config = transformers.Gemma3TextConfig(**WIDE, pad_token_id=PAD, num_key_value_heads=1, head_dim=8, **options)
    return transformers.Gemma3ForCausalLM(config)


ROUNDED = {  # their norms compute in float32
    "gemma 2, not capped": lambda: of("Gemma2", num_key_value_heads=1, head_dim=8, final_logit_softcapping=None),
    "gemma 2, capped": lambda: of("Gemma2", num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.2),
    "gemma 3, capped": lambda: gemma3(final_logit_softcapping=0.2),
    "vaultgemma, capped": lambda: of("VaultGemma", num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.2),
    "granite, scaled": lambda: of("Granite", num_key_value_heads=1, logits_scaling=3.0),
    "cohere, scaled": lambda: of("Cohere", num_key_value_heads=1, logit_scale=0.7),
    "qwen 2": lambda: of("Qwen2", num_key_value_heads=1),
}
MODELS = {**LANGUAGE, "gpt-neox": lambda: of("GPTNeoX"), "gpt-j, with a bias": gptj, **ROUNDED}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(logits, "BLOCK", dict.fromkeys(logits.BLOCK, 100))
    monkeypatch.setattr(logits, "MIN_COLUMNS", 1)


def text():
    """The first token and padding are no targets, and the last row has no target."""
    batch = tokens()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[0, :3] = -100
    batch["attention_mask"][-1] = 1  # attention needs at least one token
    return {**batch, "labels": labels}


def losses_with(head):
    return lambda model, batch: causal_lm_losses(
        model, batch["input_ids"], batch["labels"], attention_mask=batch["attention_mask"], head=head
    )


@pytest.mark.parametrize("name", MODELS)
def test_losses_gradients_and_norms_are_those_of_the_logits(name):
    torch.manual_seed(0)
    model, batch, rtol = in_float64(MODELS[name]()).eval(), text(), 1e-5 if name in ROUNDED else 1e-9
    chunked, whole = losses_with("chunked"), losses_with("logits")
    torch.testing.assert_close(chunked(model, batch), whole(model, batch), rtol=rtol, atol=0)
    assert (chunked(model, batch)[-1], "forward" in vars(model.get_output_embeddings())) == (0, False)
    with torch.inference_mode():
        torch.testing.assert_close(chunked(model, batch), whole(model, batch), rtol=rtol, atol=0)
    bound = by_loop(model, batch, whole, max_grad_norm=1.0)[0].median().item()
    norms, sums = by_loop(model, batch, whole, max_grad_norm=bound)
    _, ordinary = by_loop(model, batch, chunked, max_grad_norm=bound)
    for passes in (1, 2):
        ours, our_sums = by_clipper(model, batch, chunked, max_grad_norm=bound, passes=passes)
        torch.testing.assert_close(ours, norms, rtol=rtol, atol=1e-12)
        for key, total in sums.items():
            allowed = rtol * total.norm() + (1e-7 if name in ROUNDED else 1e-12) * bound
            assert (our_sums[key] - total).norm() <= allowed, key
            assert (ordinary[key] - total).norm() <= allowed, key


def test_checkpoints_inside_and_around_the_model_are_exact():
    torch.manual_seed(0)
    model, batch = gpt2().double().train(), text()
    model.activation_checkpointing_enable({"use_reentrant": False})
    norms, _ = by_loop(model, batch, losses_with("logits"), max_grad_norm=1.0)
    chunked = losses_with("chunked")
    for losses in (chunked, lambda m, b: checkpoint(chunked, m, b, use_reentrant=False)):
        ours, _ = by_clipper(model, batch, losses, max_grad_norm=1.0)
        torch.testing.assert_close(ours, norms, rtol=1e-9, atol=1e-12)


def test_a_head_of_another_class_or_name_is_refused():
    class Wrapped(nn.Linear):
        pass

    model, batch = gpt2(tie_word_embeddings=False), text()
    model.lm_head.__class__ = Wrapped
    with pytest.raises(
        ValueError, match=r"the head of GPT2LMHeadModel is a Wrapped and no Linear; give head=\"logits\""
    ):
        losses_with("chunked")(model, batch)
    with pytest.raises(ValueError, match="head is 'fused'; choose one of chunked, logits"):
        losses_with("fused")(model, batch)


def test_the_forward_of_the_head_is_restored_after_errors():
    model, batch = gpt2(), text()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    taken = model.lm_head.forward
    model.transformer.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        losses_with("chunked")(model, batch)
    assert model.lm_head.forward == taken
    clipper.close()
    assert "forward" not in vars(model.lm_head)


def test_a_fused_gelu_is_the_same_function():
    torch.manual_seed(0)
    model, batch = gpt2().double().eval(), text()
    before = losses_with("logits")(model, batch)
    assert fuse_gelu(model) == 2
    assert fuse_gelu(model) == 0
    torch.testing.assert_close(losses_with("logits")(model, batch), before, rtol=1e-12, atol=0)


@pytest.mark.parametrize("head", ["chunked", "logits"])
@pytest.mark.parametrize("passes", [1, 2])
def test_an_example_of_several_rows_is_clipped_as_if_it_were_alone(head, passes):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=9, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).double().eval()
    lengths = torch.tensor([[7, 7, 3], [5, 0, 0], [7, 2, 0], [1, 0, 0]])  # the last one has no target
    mask = (torch.arange(7) < lengths[..., None]).long()
    ids = torch.randint(0, 20, mask.shape)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    def losses(model, batch):
        return causal_lm_losses(model, **batch, head=head)

    report = verify(model, batch, losses, passes=passes)
    assert report.ok, report.findings
    with torch.no_grad():
        found = losses(model, batch)
        rows = [
            causal_lm_losses(model, ids[:1, k, :n], ids[:1, k, :n], head=head) * (n - 1)
            for k, n in enumerate(lengths[0].tolist())
        ]
    torch.testing.assert_close(found[0], torch.cat(rows).sum() / (lengths[0] - 1).sum())
    assert found[3] == 0
