"""The reversible GPT-2 computes the same function in every memory mode, private or not, with memory flat in depth."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM

from memsave.ghost import GhostClipper
from memsave.ghost.snapshot import SAMPLE
from memsave.models.language import causal_lm_losses
from memsave.models.memory import MEMORY_MODES
from memsave.models.rev_gpt2 import RevGPT2, RevGPT2Config
from memsave.profiler import MemoryRecorder
from tests.ghost.test_transformers import PAD, VOCABULARY, tokens
from tests.support.per_example_reference import assert_exact


def model_of(*, layers=2, heads=2, width=16, seed=0, double=True, **options):
    torch.manual_seed(seed)
    ends = {"bos_token_id": PAD, "eos_token_id": PAD, "pad_token_id": PAD}
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "initializer_range": 0.3}
    config = RevGPT2Config(
        **ends, **sizes, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, **options
    )
    model = RevGPT2(config).train()
    return model.double() if double else model  # a fake model cannot be converted


def losses_of(model, batch, *, head="chunked"):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return causal_lm_losses(model, batch["input_ids"], labels, attention_mask=batch["attention_mask"], head=head)


def gradients(model, batch, mode):
    model.memory = mode
    losses = losses_of(model, batch)
    return losses.detach(), torch.autograd.grad(losses.sum(), list(model.parameters()))


@given(
    batch=st.integers(1, 4),
    positions=st.integers(1, 9),
    layers=st.integers(1, 5),
    heads=st.sampled_from([1, 2, 4]),
    tied=st.booleans(),
)
@settings(max_examples=8, deadline=None)
def test_memory_modes_compute_the_same_function(batch, positions, layers, heads, tied):
    model, batch = (
        model_of(layers=layers, heads=heads, tie_word_embeddings=tied),
        tokens(batch=batch, positions=positions),
    )
    stored, expected = gradients(model, batch, "stored")
    for mode in ("checkpoint", "reversible"):
        losses, found = gradients(model, batch, mode)
        assert torch.equal(losses, stored)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mode", MEMORY_MODES)
@pytest.mark.parametrize("head", ["chunked", "logits"])
def test_norms_and_clipped_sums_are_exact_in_each_memory_mode(mode, head):
    model = model_of()
    model.memory = mode
    assert_exact(model, tokens(), lambda model, batch: losses_of(model, batch, head=head))


def test_passes_auto_takes_two_passes_when_activations_are_rebuilt():
    for mode, passes in (("stored", 1), ("checkpoint", 2), ("reversible", 2)):
        model = model_of()
        model.memory = mode
        clipper = GhostClipper(model, max_grad_norm=1.0)
        clipper.backward(losses_of(model, tokens()))
        assert clipper.chosen_passes == passes


BATCH = 8
MATRICES, NORM_HOOKS, TENSORS = 4, 8, 16  # of a layer


def bytes_beside_parameters(layers, *, mode, private):
    """The exact peak of a step without parameters and gradients."""
    with FakeTensorMode():
        model, ids = model_of(layers=layers, double=False), torch.zeros(BATCH, 24, dtype=torch.long)
        model.memory = mode
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        clipper = GhostClipper(model, max_grad_norm=1.0) if private else None
        with MemoryRecorder(model) as recorder:
            losses = losses_of(model, batch)
            clipper.backward(losses) if clipper else losses.sum().backward()
    states = recorder.report().timeline.by_category()
    return max(map(sum, zip(*(each for name, each in states.items() if name not in ("parameter", "gradient")))))


@pytest.mark.slow
@pytest.mark.parametrize("private", [False, True], ids=["plain", "ghost"])
def test_memory_is_flat_in_depth(private):
    few, many = (bytes_beside_parameters(layers, mode="reversible", private=private) for layers in (4, 16))
    # for each example: a matrix's bound on rounding, and for two tensors of each norm hook, a sum and a norm to
    # compare the two passes; for each parameter: a sample to find out whether the forward changed it
    numbers = (4 * BATCH * (MATRICES + 2 * 2 * NORM_HOOKS) + 4 * SAMPLE * TENSORS) * (16 - 4)
    assert 0 <= many - few <= (numbers if private else 0)
    if not private:
        assert bytes_beside_parameters(16, mode="checkpoint", private=False) > 2 * many


def test_the_rebuilt_stream_drifts_little_in_48_layers():
    model, batch = model_of(layers=48, double=False), tokens()
    expected = gradients(model, batch, "stored")[1]
    for one, other in zip(gradients(model, batch, "reversible")[1], expected, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-8


@pytest.mark.usefixtures("device")
def test_later_tokens_and_padding_have_no_effect():
    model, ids = model_of().eval(), torch.randint(1, VOCABULARY, (2, 7))
    whole = model(ids).logits
    torch.testing.assert_close(model(ids[:, :4]).logits, whole[:, :4])
    padded, mask = torch.full((2, 12), PAD), torch.zeros(2, 12, dtype=torch.long)
    for first in (0, 5):
        padded[:, first : first + 7], mask[:, first : first + 7] = ids, 1
        torch.testing.assert_close(model(padded, mask).logits[:, first : first + 7], whole)
        assert model(padded, mask).logits.isfinite().all()
        padded.fill_(PAD), mask.fill_(0)


@pytest.mark.usefixtures("device")
def test_generation_with_and_without_a_cache_is_equal():
    model, mask = model_of().eval(), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    ids = torch.randint(1, VOCABULARY, (2, 4)) * mask
    options = {"attention_mask": mask, "num_beams": 3, "do_sample": False, "max_new_tokens": 6}
    cached, plain = (model.generate(ids, **options, use_cache=each) for each in (True, False))
    assert torch.equal(cached, plain)
    alone = model.generate(ids[1:, 2:], num_beams=3, do_sample=False, max_new_tokens=6)
    assert torch.equal(cached[1, 2 : 2 + alone.shape[1]], alone[0])
    with torch.no_grad():
        cache = model(ids[:, :3], mask[:, :3], use_cache=True).past_key_values
        last = model(ids[:, 3:], mask, past_key_values=cache, logits_to_keep=1).logits
    torch.testing.assert_close(last, model(ids, mask).logits[:, -1:])
    with pytest.raises(ValueError, match=r"give whole texts, or use torch\.no_grad\(\)"):
        model(ids, mask, past_key_values=cache)


def test_transformers_saves_and_loads_the_model(tmp_path):
    model = model_of(double=False)
    model.memory = "reversible"
    model.save_pretrained(tmp_path)
    for kind in (RevGPT2, AutoModelForCausalLM):
        loaded = kind.from_pretrained(tmp_path)
        assert loaded.lm_head.weight is loaded.wte.weight
        assert loaded.memory == "stored"
        assert torch.equal(loaded(tokens()["input_ids"]).logits, model.eval()(tokens()["input_ids"]).logits)


def test_each_branch_is_small_at_initialisation():
    model = model_of(layers=4)
    for layer in model.layers:
        for norm in (layer.attention.post_norm, layer.mlp[-1]):
            assert (norm.weight == 0.5).all()


def test_invalid_arguments_raise_errors():
    with pytest.raises(ValueError, match="hidden_size is 16, which is no multiple of the 3 heads"):
        model_of(heads=3)
    with pytest.raises(ValueError, match="memory is 'free'; choose one of stored, checkpoint, reversible"):
        model_of().memory = "free"
