"""The losses of models with adapters are those of each example alone and without padding, in float64."""

import copy

import pytest
import torch

from memsave.ghost import GhostClipper
from memsave.models.language import causal_lm_losses
from memsave.models.virtual_tokens import generate
from memsave.tasks.language.adapters import IA3, Dora, Lora, Prefix, Prompt
from memsave.tasks.language.trained_parts import AttentionOnly, BitFit, FrozenParts
from memsave.training.measure import get_memory, set_memory
from tests.ghost.test_transformers import gpt2 as gpt2_with_dropout
from tests.ghost.test_transformers import in_float64, llama
from tests.models.test_rev_gpt2 import model_of as rev_gpt2
from tests.support.per_example_reference import by_loop

pytest.importorskip("transformers")
pytest.importorskip("peft")

ADAPTERS = {
    "lora": Lora(rank=3),
    "lora, head saved": Lora(rank=3, modules_to_save=["lm_head"], target_modules=["all-linear"], rslora=True),
    "dora": Dora(rank=2, bias="all"),
    "ia3": IA3(),
    "prefix": Prefix(tokens=3),
    "prefix, projected": Prefix(tokens=3, projection=True, projection_size=8),
    "prompt": Prompt(tokens=3),
    "bitfit": BitFit(),
    "attention": AttentionOnly(),
    "frozen": FrozenParts(parts=["embeddings", "head"]),
}
LENGTHS = (7, 4, 6, 2)


def gpt2(**options):
    return gpt2_with_dropout(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **options)


def adapted(name, make=gpt2, *, noise=0.1):
    """A model whose adapter is no longer the identity."""
    torch.manual_seed(0)
    model = in_float64(ADAPTERS[name].apply(make()).double()).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += noise * torch.randn_like(parameter)
    return model


def padded():
    """Texts of several lengths; the first token of each is no target."""
    ids = torch.randint(1, 6, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    labels = ids.masked_fill(~mask, -100)
    labels[:, 0] = -100
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long(), "labels": labels}


def losses_with(head):
    return lambda model, batch: causal_lm_losses(
        model, batch["input_ids"], batch["labels"], attention_mask=batch["attention_mask"], head=head
    )


def alone(model, bound):
    """(losses, norms, clipped sums) of the logits of each text in a batch of its own without padding."""
    found, batch, losses_of = [], padded(), losses_with("logits")
    for row, length in enumerate(LENGTHS):
        text = {key: value[row : row + 1, :length] for key, value in batch.items()}
        found.append((losses_of(model, text), *by_loop(model, text, losses_of, max_grad_norm=bound)))
    sums = {name: sum(each[2][name] for each in found) for name in found[0][2]}
    return torch.cat([each[0] for each in found]), torch.cat([each[1] for each in found]), sums


def assert_same_as_alone(model, *, head, modes=("stored", "checkpoint"), passes=(1, 2)):
    bound = alone(model, 1.0)[1].median().item()
    losses, norms, sums = alone(model, bound)
    torch.testing.assert_close(losses_with(head)(model, padded()), losses, rtol=1e-9, atol=0)
    for mode in modes:
        set_memory(model, mode)
        assert get_memory(model) == mode
        for number in passes:
            copied = copy.deepcopy(model)
            clipper = GhostClipper(copied, max_grad_norm=bound, passes=number)
            for _ in range(2):  # the second forward is not followed, unless that is needed
                copied.zero_grad()
                ours = clipper.backward(losses_with(head)(copied, padded()))
                torch.testing.assert_close(ours.detach(), norms, rtol=1e-9, atol=0)
                for name, total in sums.items():
                    difference = copied.get_parameter(name).grad - total
                    assert difference.norm() <= 1e-9 * total.norm() + 1e-12 * bound, name


@pytest.mark.parametrize(
    ("name", "head"),
    [
        *((name, "chunked") for name in ADAPTERS),
        *(pytest.param(name, "logits", marks=[] if name == "lora" else [pytest.mark.slow]) for name in ADAPTERS),
    ],
)
def test_losses_and_clipped_gradients_are_those_of_each_text_alone(name, head):
    adapter = ADAPTERS[name]
    modes = [mode for mode in ("stored", "checkpoint") if mode in adapter.memory_modes and mode in adapter.ghost_modes]
    assert_same_as_alone(adapted(name), head=head, modes=modes)


@pytest.mark.parametrize("name", ["dora", "prefix", "prompt"])
def test_rotary_positions_are_exact(name):
    assert_same_as_alone(adapted(name, llama), head="chunked", modes=["stored"])


def test_lora_on_a_reversible_model_is_exact():
    assert_same_as_alone(adapted("lora", rev_gpt2), head="chunked", modes=["reversible"])


def test_checkpoints_do_not_make_frozen_embeddings_differentiable():
    model = gpt2()
    set_memory(model, "checkpoint")
    model = Lora().apply(model)
    assert get_memory(model) == "checkpoint"
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("name", ["lora", "dora", "prompt", "bitfit"])
def test_checkpoints_give_the_same_gradients_without_a_clipper(name):
    model, found = adapted(name), {}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for mode in ("stored", "checkpoint"):
        set_memory(model, mode)
        found[mode] = torch.autograd.grad(losses_with("chunked")(model, padded()).sum(), trained)
    torch.testing.assert_close(found["checkpoint"], found["stored"], rtol=1e-12, atol=0)


def test_texts_padded_on_the_left_are_refused_for_prompt_tuning():
    batch = padded()
    flipped = {"input_ids": batch["input_ids"].flip(1), "attention_mask": batch["attention_mask"].flip(1)}
    labels = flipped["input_ids"].masked_fill(flipped["attention_mask"] == 0, -100)
    with pytest.raises(ValueError, match=r"padding on the left changes the logits of .*pad on the right"):
        causal_lm_losses(adapted("prompt"), labels=labels, **flipped)


def test_a_head_with_lora_needs_its_logits():
    model = Lora(target_modules=["lm_head"]).apply(gpt2(tie_word_embeddings=False))
    with pytest.raises(ValueError, match='the head of GPT2LMHeadModel is a Linear of PEFT and no Linear; give head="'):
        losses_with("chunked")(model, padded())


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("name", ["lora", "prefix", "prompt"])
def test_generated_text_does_not_depend_on_the_padding_of_the_prompt(name, make, beams):
    model = adapted(name, make, noise=1.0).eval()
    options = {"num_beams": beams, "do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    for seed in range(3):
        prompts = torch.randint(1, 31, (2, 6), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(prompts)
        mask[1, :4] = 0
        with torch.no_grad():
            together = generate(model, input_ids=prompts, attention_mask=mask, eos_token_id=1, **options)
            single = generate(model, input_ids=prompts[1:, 4:], attention_mask=mask[1:, 4:], eos_token_id=1, **options)
            if beams == 1:
                logits = model(input_ids=together[1:, 4:], attention_mask=torch.ones(1, 7).long()).logits
        assert torch.equal(together[:, :6], prompts)
        assert torch.equal(together[1, 6:], single[0, 2:])
        if beams == 1:  # greedily, as by whole forwards; the end token 1 is excluded
            chosen = logits[0, -6:-1].index_fill(1, torch.tensor(1), -torch.inf).argmax(1)
            assert torch.equal(together[1, 6:], chosen)
