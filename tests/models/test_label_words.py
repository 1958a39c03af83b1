"""Logits of label words: those of the whole vocabulary at one position, and exact under ghost clipping."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("transformers")

import transformers

from memsave.models.label_words import label_word_logits
from memsave.models.language import set_checkpointing
from memsave.models.rev_gpt2 import RevGPT2, RevGPT2Config
from memsave.models.trial import has_passed
from tests.support.examples_alone import alone, assert_same
from tests.support.per_example_reference import by_clipper

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
BERT_SIZES = {**SIZES, "intermediate_size": 24, "max_position_embeddings": 24}
MASKED = {
    "bert": lambda: transformers.BertConfig(**BERT_SIZES),
    "roberta": lambda: transformers.RobertaConfig(**BERT_SIZES, type_vocab_size=1),
    "albert": lambda: transformers.AlbertConfig(**BERT_SIZES, embedding_size=8),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=24, pad_token_id=0
    ),
    "modernbert": lambda: transformers.ModernBertConfig(
        **BERT_SIZES, local_attention=8, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    ),
    "electra": lambda: transformers.ElectraConfig(**BERT_SIZES, embedding_size=8),
    "deberta-v2": lambda: transformers.DebertaV2Config(
        **BERT_SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8
    ),
}
CAUSAL = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=24, bos_token_id=1, eos_token_id=1
    ),
    "rev_gpt2": lambda: RevGPT2Config(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=24
    ),
}
WORDS = torch.tensor([7, 31, 4])


def model_of(name):
    torch.manual_seed(0)
    if name == "rev_gpt2":
        model = RevGPT2(CAUSAL[name]())
    elif name in CAUSAL:
        model = transformers.AutoModelForCausalLM.from_config(CAUSAL[name]())
    else:
        model = transformers.AutoModelForMaskedLM.from_config(MASKED[name]())
    for parameter in model.parameters():  # no bias stays zero, and no embedding of padding
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.double().eval()


def batch_of(lengths=(9, 6, 11), *, seed=0):
    """Texts with padding on the right; the slot of the first is not at its end."""
    torch.manual_seed(seed)
    ids = torch.randint(3, 50, (len(lengths), max(lengths)))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    ids[mask == 0] = 0
    position = torch.tensor([length - 3 for length in lengths])
    label = torch.arange(len(lengths)) % 3
    return {"input_ids": ids, "attention_mask": mask, "position": position, "label": label}


def losses(model, batch):
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits = label_word_logits(model, inputs, position=batch["position"], words=WORDS)
    return F.cross_entropy(logits, batch["label"], reduction="none")


def all_logits(model, batch):
    """(B, V): the logits at the position of each example, alone and without padding."""
    found = []
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        logits = model(input_ids=batch["input_ids"][row : row + 1, :length]).logits
        found.append(logits[0, batch["position"][row]])
    return torch.stack(found)


def without_padding(batch):
    """Each example in a batch of its own, without its padding."""
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        yield {key: value[:, :length] if value.dim() == 2 else value for key, value in one.items()}


@pytest.mark.parametrize("name", [*MASKED, *CAUSAL])
def test_logits_are_those_of_each_text_alone_with_the_whole_vocabulary(name):
    model, batch = model_of(name), batch_of()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    found = label_word_logits(model, inputs, position=batch["position"], words=WORDS)
    assert has_passed(model, "label words")  # and the logits of the vocabulary are not the fallback
    expected = all_logits(model, batch)[:, WORDS]
    # some models compute their norms or their attention in float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*MASKED, *CAUSAL])
def test_clipping_is_exact_against_each_text_alone_without_padding(name):
    model, batch = model_of(name), batch_of()
    parts = [alone(model, one, losses) for one in without_padding(batch)]
    norms = torch.cat([part[1] for part in parts])
    bound = norms.median().item()
    sums = {}
    for (_, _, own), factor in zip(parts, (bound / norms).clamp(max=1.0)):
        assert own.keys() == parts[0][2].keys()
        for key, value in own.items():  # `alone` with one example clips to its own norm, and so not at all
            sums[key] = sums.get(key, 0) + factor * value
    for passes in (1, 2):
        results = by_clipper(model, batch, losses, max_grad_norm=bound, passes=passes)
        assert_same(results, (bound, norms, sums), rtol=1e-7 if name == "modernbert" else 1e-9)


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_checkpoints_change_nothing(name):
    model, batch = model_of(name), batch_of()
    expected = by_clipper(model, batch, losses, max_grad_norm=0.5)
    set_checkpointing(model.train(), on=True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    norms, sums = by_clipper(model, batch, losses, max_grad_norm=0.5)
    assert_same((norms, sums), (0.5, *expected), rtol=1e-9)


def test_the_logits_of_the_vocabulary_are_never_computed():
    model, batch, seen = model_of("bert"), batch_of(), []
    losses(model, batch)  # the forward that confirms has all logits of one example

    class Shapes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            found = function(*arguments, **(options or {}))
            seen.extend(tuple(each.shape) for each in (found,) if isinstance(each, torch.Tensor))
            return found

    with Shapes():
        losses(model, batch)
    assert (3, 3) in seen
    assert not [shape for shape in seen if len(shape) == 3 and shape[-1] == 50]


class Scaled(nn.Module):
    """A model that mixes the logits of the vocabulary, so that chosen rows alone give other values."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None):
        logits = self.head(self.body(input_ids))
        return transformers.modeling_outputs.MaskedLMOutput(logits=logits - logits.mean(-1, keepdim=True))


def test_a_model_that_mixes_its_logits_gets_all_of_them():
    model, batch = Scaled().double(), batch_of()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    found = label_word_logits(model, inputs, position=batch["position"], words=WORDS)
    assert not has_passed(model, "label words")
    torch.testing.assert_close(found, all_logits(model, batch)[:, WORDS])


def test_prompt_tuning_and_lora_keep_the_position():
    peft = pytest.importorskip("peft")
    batch = batch_of()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    for config in (
        peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], init_lora_weights=False),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ):
        model = peft.get_peft_model(model_of("gpt2").float(), config).double().eval()
        found = label_word_logits(model, inputs, position=batch["position"], words=WORDS)
        logits = model(**inputs).logits
        logits = logits[:, logits.shape[1] - inputs["input_ids"].shape[1] :]
        torch.testing.assert_close(found, logits[torch.arange(3), batch["position"]][:, WORDS])
