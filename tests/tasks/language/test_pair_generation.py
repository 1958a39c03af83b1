"""Encoder-decoders in task=generation: prompts into the encoder, completions as targets of the decoder."""

import json
from itertools import chain

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sacrebleu")

import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

from memsave.config import ConfigError
from memsave.config.compose import compose, to_objects
from memsave.data.loader import Index
from memsave.data.text.collate import IGNORED
from memsave.data.text.visits import public_records
from memsave.planning.fake_step import fake_step
from memsave.progress import Progress
from memsave.tasks.language.generation import PairGeneration
from memsave.tasks.language.small_gpt2 import train_tokenizer
from memsave.tasks.loading import load_model
from tests.support.per_example_reference import assert_exact

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random BART with its tokenizer."""
    found = tmp_path_factory.mktemp("bart")
    tokenizer = train_tokenizer([each.completion for each in public_records(100)], size=350)
    parts = {"layers": 2, "attention_heads": 2, "ffn_dim": 24}
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in parts.items()}
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = {"vocab_size": len(tokenizer), "pad_token_id": pad, "eos_token_id": end, "decoder_start_token_id": end}
    more = {"bos_token_id": end, "forced_eos_token_id": None, "max_position_embeddings": 64}
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **ids, **more, d_model=16))
    model.save_pretrained(found)
    tokenizer.save_pretrained(found)
    return found


def config_of(folder, *overrides):
    return to_objects(compose(["experiment=gpt2_dp", "model=gpt2", f"model.name={folder}", *overrides]))


@pytest.fixture
def prepared(folder):
    """(definition, task, model)"""
    config = config_of(
        folder, "data.records=6", "data.held_out=3", "data.max_length=40", "task.generate=2", "task.beams=2"
    )
    definition = config.task.definition(config)
    model, tokenizer = definition.make_model(progress=Progress())
    return definition, definition.make_task(CPU, tokenizer, progress=Progress()), model


def test_an_encoder_decoder_gets_pairs(prepared):
    _, task, _ = prepared
    assert isinstance(task, PairGeneration)
    batch = task.load([Index(each, each) for each in range(4)])
    end = task.tokenizer.eos_token_id
    for (row,), ids, mask, labels in zip(task.examples, *batch.values(), strict=False):
        assert ids[mask != 0].tolist() == row.ids
        assert labels[labels != IGNORED].tolist() == row.labels
        assert row.ids[-1] == end
        assert max(len(row.ids), len(row.labels)) <= 40
    assert task.cuts.cut_tokens > 0
    assert task.load([])["labels"].shape == (0, 1)


def test_clipping_is_exact(prepared):
    definition, task, model = prepared
    torch.manual_seed(0)
    batch = task.load([Index(each, each) for each in range(4)])
    losses = definition.per_example_losses(model, batch)
    torch.manual_seed(0)
    assert_exact(model.double().eval(), batch, task.per_example_losses)
    assert losses.shape == (4,)


def test_it_is_evaluated_and_released(prepared, tmp_path):
    _, task, model = prepared
    assert set(task.evaluate(model)) == {"perplexity", "bleu", "rouge_l"}
    task.show(tmp_path)
    task.release(model, tmp_path / "model")
    assert type(load_model(tmp_path / "model")).__name__ == "BartForConditionalGeneration"
    assert json.loads((tmp_path / "model" / "prompt.json").read_text())["model"] == "encoder_decoder"


def test_a_text_does_not_depend_on_the_batch(prepared):
    _, task, model = prepared
    prompts = list(task.completions)
    together = task.write(model, prompts)
    assert {prompt: task.write(model, [prompt])[prompt] for prompt in prompts} == together


def test_the_perplexity_of_a_zero_model_is_the_size_of_the_vocabulary(prepared):
    _, task, model = prepared
    for parameter in model.parameters():
        parameter.data.zero_()
    assert task.perplexity(model) == pytest.approx(len(task.tokenizer), rel=1e-4)


def test_documents_do_not_suit_an_encoder_decoder(folder):
    config = config_of(folder, "data=documents", "data.root=/my/texts")
    with pytest.raises(
        ConfigError, match=r"data=documents has no prompts, which the encoder of model=gpt2 \(.*\) reads"
    ):
        config.task.definition(config).make_model(progress=Progress())


def test_sizes_of_both_parts_vary_together(folder):
    config = config_of(folder)
    definition = config.task.definition(config)
    model = definition.make_fake_model(architecture=definition.variations()["depth"]().architecture(3))
    assert (len(model.get_encoder().layers), len(model.get_decoder().layers)) == (3, 3)
    model = definition.make_fake_model(architecture=definition.variations()["channels"]().architecture(32))
    layer = model.get_decoder().layers[0]
    assert (layer.fc1.weight.shape, layer.self_attn.num_heads) == ((48, 32), 4)


@pytest.mark.parametrize("privacy", [pytest.param("none", marks=pytest.mark.slow), "ghost"])
def test_a_step_is_planned(folder, privacy):
    config = config_of(folder, f"privacy={privacy}", "trainer.batch_size=4", "data.max_length=8")
    with FakeTensorMode():
        fake_step(config, device=CPU).run()
    first, *others = chain.from_iterable(config.task.definition(config).memory_choices(CPU))
    assert (first.memory.mode, first.model.head, len(others)) == ("stored", "logits", 3)
