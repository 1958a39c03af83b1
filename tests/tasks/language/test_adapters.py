"""Adapters: which parameters train, the files of `model/`, and one sentence for each fault."""

import copy
import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers
from peft import PeftModel
from safetensors.torch import load_file

import memsave
from memsave.config import ConfigError
from memsave.config.compose import compose, to_objects
from memsave.config.registry import options
from memsave.tasks.language.adapter_files import save_model
from memsave.tasks.language.adapters import IA3, Dora, Lora, Prefix, Prompt
from memsave.tasks.language.pretrained import Purpose, load_pretrained, with_random_weights
from memsave.tasks.language.trained_parts import AttentionOnly, BitFit, FrozenParts
from memsave.training.measure import set_memory
from tests.ghost.test_transformers import WIDE, bert, gpt2, llama
from tests.models.test_rev_gpt2 import model_of as rev_gpt2

IDS = torch.randint(1, 31, (2, 7), generator=torch.Generator().manual_seed(0))
RELEASED = {
    "lora": Lora(modules_to_save=["ln_f"], bias="all"),
    "dora": Dora(),
    "ia3": IA3(),
    "prefix": Prefix(tokens=3),
    "prefix, projected": Prefix(tokens=3, projection=True),
    "prompt": Prompt(tokens=3),
}


def gpt2_classifier():
    config = transformers.GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, num_labels=3, pad_token_id=0)
    return transformers.GPT2ForSequenceClassification(config)


def roberta():
    config = transformers.RobertaConfig(**{**WIDE, "pad_token_id": 0}, num_labels=3)
    return transformers.RobertaForSequenceClassification(config)


def masked_bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**WIDE))


def t5():
    sizes = {"vocab_size": 31, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def changed(model):
    """The model after changes of what trains; the adapter is no longer the identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


@pytest.mark.parametrize(
    ("make", "adapter", "parts"),
    [
        (gpt2, Lora(), {"c_attn.lora_A.default", "c_attn.lora_B.default"}),
        (gpt2, Lora(target_modules=["all-linear"], layers=[1]), {"h.1."}),
        (gpt2, Lora(modules_to_save=["ln_f"]), {".lora_", "ln_f.modules_to_save.default"}),
        (gpt2, Lora(bias="lora_only"), {".lora_", "c_attn.base_layer.bias"}),
        (gpt2, Dora(), {".lora_A", ".lora_B", ".lora_magnitude_vector"}),
        (gpt2, IA3(), {"c_attn.ia3_l", "mlp.c_proj.ia3_l"}),
        (llama, IA3(target_modules=["k_proj"]), {"k_proj.ia3_l"}),
        (gpt2, Prefix(tokens=3, projection=True), {"prompt_encoder.default.embedding", "prompt_encoder.default.trans"}),
        (gpt2, Prompt(tokens=3), {"prompt_encoder.default.embedding.weight"}),
        (gpt2, BitFit(), {".bias"}),
        (gpt2, AttentionOnly(), {".attn."}),
        (rev_gpt2, Lora(), {".lora_"}),
        (rev_gpt2, AttentionOnly(), {".attention."}),
        (t5, Lora(), {".lora_"}),
        (t5, Prompt(tokens=3), {"prompt_encoder"}),
        (masked_bert, Lora(), {".lora_"}),
        (bert, Lora(), {".lora_", "classifier.modules_to_save.default"}),
        (roberta, Dora(), {".lora_", "classifier.modules_to_save.default"}),
        (roberta, IA3(), {".ia3_l", "classifier.modules_to_save.default"}),
        (roberta, Prefix(tokens=3), {"prompt_encoder", "classifier."}),
        (roberta, Prompt(tokens=3), {"prompt_encoder", "classifier."}),
        (gpt2_classifier, Lora(), {".lora_", "score.modules_to_save.default"}),
        (gpt2_classifier, Prefix(tokens=3), {"prompt_encoder", "score."}),
        (roberta, BitFit(), {".bias", "classifier.dense.weight", "classifier.out_proj.weight"}),
        (roberta, AttentionOnly(), {".attention.", "classifier."}),
    ],
)
def test_only_the_adapter_and_a_new_head_train(make, adapter, parts):
    names = trained(adapter.apply(make()))
    assert all(any(part in name for part in parts) for name in names), names
    assert all(any(part in name for name in names) for part in parts), names


def test_bitfit_and_attention_train_all_of_their_parameters():
    model = gpt2()
    assert len(trained(BitFit().apply(model))) == sum(name.endswith("bias") for name, _ in model.named_parameters())
    assert len(trained(AttentionOnly().apply(model))) == 2 * 4


@pytest.mark.parametrize(
    ("parts", "tied", "frozen"),
    [
        (["embeddings"], True, {"transformer.wte.weight", "transformer.wpe.weight"}),
        (["head"], True, {"transformer.wte.weight"}),
        (["embeddings"], False, {"transformer.wte.weight", "transformer.wpe.weight"}),
        (["head"], False, {"lm_head.weight"}),
        (["embeddings", "head"], False, {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}),
    ],
)
def test_frozen_parts(parts, tied, frozen):
    model = FrozenParts(parts=parts).apply(gpt2(tie_word_embeddings=tied))
    assert {name for name, _ in model.named_parameters()} - trained(model) == frozen


def test_the_relative_positions_of_attention_are_no_embeddings():
    model = FrozenParts().apply(t5())
    assert {name for name, _ in model.named_parameters()} - trained(model) == {"shared.weight"}


@pytest.mark.parametrize("make", [gpt2, rev_gpt2])
def test_a_new_adapter_changes_nothing_at_first(make):
    torch.manual_seed(0)
    base = make().eval()
    expected = logits(base)
    for adapter in (Lora(), Lora(init="gaussian"), Dora(), IA3()):
        model = adapter.apply(copy.deepcopy(base)).eval()
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a small base model."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    gpt2().save_pretrained(folder)
    return folder


def from_folder(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.name_or_path = str(folder)
    return model


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_adapter_gives_the_same_logits(name, base, tmp_path):
    model = changed(RELEASED[name].apply(from_folder(base)))
    save_model(model, tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in held.values()) <= sum(p.numel() for p in from_folder(base).parameters()) / 2
    for loaded in (
        memsave.load(tmp_path),
        PeftModel.from_pretrained(from_folder(base), tmp_path).eval(),
    ):
        assert not loaded.training
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "prompt"])
def test_a_released_adapter_has_only_what_trained(name, base, tmp_path):
    model = RELEASED[name].apply(from_folder(base))
    expected = {plain_name(name) for name in trained(model)}
    save_model(model, tmp_path)
    held = {plain_name(name) for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert held == (expected if name != "prompt" else {"prompt_embeddings"})


def plain_name(name):
    """Without the parts that PEFT puts into a name or leaves out."""
    for part in (".default", ".modules_to_save"):
        name = name.replace(part, "")
    return name.removesuffix(".weight") if "lora_magnitude" in name else name


@pytest.mark.parametrize("make", [gpt2, llama, rev_gpt2, masked_bert, roberta])
@pytest.mark.parametrize("name", ["lora", "dora", "ia3"])
def test_a_merged_model_gives_the_same_logits_and_leaves_the_adapter(name, make, tmp_path):
    if name == "lora":
        adapter = Lora(merge=True, bias="all")
    else:
        adapter = {"dora": Dora(merge=True), "ia3": IA3(merge=True)}[name]
    model = changed(adapter.apply(make()))
    expected, before = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    whole = adapter.released(model)
    assert isinstance(whole, transformers.PreTrainedModel)
    torch.testing.assert_close(logits(whole), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    save_model(whole, tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    torch.testing.assert_close(logits(memsave.load(tmp_path).float()), expected.float(), rtol=1e-4, atol=1e-5)


def test_an_adapter_is_not_merged_by_default():
    model = Lora().apply(gpt2())
    assert Lora().released(model) is model
    assert not hasattr(Prompt(), "merge") and not hasattr(Prefix(), "merge")


@pytest.mark.parametrize("adapter", [Lora(), Prompt(tokens=3), IA3()])
def test_a_classifier_is_loaded_with_its_head_and_labels(adapter, tmp_path):
    torch.manual_seed(0)
    start = roberta()
    start.roberta.save_pretrained(tmp_path / "base")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "base", num_labels=3)
    config.id2label = {0: "no", 1: "maybe", 2: "yes"}
    model = transformers.RobertaForSequenceClassification.from_pretrained(tmp_path / "base", config=config)
    model = changed(adapter.apply(model))
    save_model(model, tmp_path / "model")
    loaded = memsave.load(tmp_path / "model")
    assert loaded.config.id2label[2] == "yes"
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_a_missing_base_model_is_named(base, tmp_path):
    elsewhere = shutil.copytree(base, tmp_path / "moved" / "base")
    save_model(Lora().apply(from_folder(elsewhere)), tmp_path / "model")
    shutil.rmtree(elsewhere)
    with pytest.raises(ConfigError, match=r"holds an adapter of the model .*base, which is not there; copy that model"):
        memsave.load(tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    (tmp_path / "model" / "adapter_config.json").write_text(
        json.dumps({**settings, "base_model_name_or_path": str(base)})
    )
    assert memsave.load(tmp_path / "model")(input_ids=IDS).logits.shape == (2, 7, 31)
    (tmp_path / "model" / "adapter_model.safetensors").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be loaded as an adapter of .*; copy it again") as caught:
        memsave.load(tmp_path / "model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "{}", '{"base_model_name_or_path": null}'])
def test_a_damaged_adapter_gives_one_sentence(content, tmp_path):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"adapter_config\.json (cannot be read|names no base model)"):
        memsave.load(tmp_path)


@pytest.mark.parametrize(
    ("make", "adapter", "words"),
    [
        (
            gpt2,
            Lora(target_modules=["c_atn"]),
            r"^adapter\.target_modules has c_atn, which GPT2LMHeadModel .*mean c_att",
        ),
        (gpt2, Lora(modules_to_save=["foo"]), r"^adapter\.modules_to_save has foo, which .*its modules are wte, wpe"),
        (
            gpt2,
            IA3(target_modules=["c_attn"], feedforward_modules=["c_fc"]),
            r"feedforward_modules has c_fc, which ada",
        ),
        (gpt2, Lora(layers=[7]), r"^adapter=lora does not fit GPT2LMHeadModel: "),
        (llama, BitFit(), r"adapter=bitfit trains biases, and LlamaForCausalLM has none; give adapter=lora"),
        (rev_gpt2, Prompt(), r"adapter=prompt needs virtual tokens, which RevGPT2 does not take; give adapter=lora"),
        (rev_gpt2, Prefix(), r"adapter=prefix needs virtual tokens, which RevGPT2 does not take"),
        (masked_bert, Prefix(), r"adapter=prefix needs virtual tokens, which BertForMaskedLM does not take"),
        (
            gpt2_classifier,
            Prompt(),
            r"GPT2ForSequenceClassification, which finds the last token of a text by its token",
        ),
        (bert, FrozenParts(parts=["head"]), r"adapter\.parts has head, and BertForSequenceClassification has no head"),
    ],
)
def test_an_adapter_that_does_not_fit_the_model_is_refused(make, adapter, words):
    with pytest.raises(ConfigError, match=words) as caught:
        adapter.apply(make())
    assert "\n" not in str(caught.value)


TEXT, IMAGES = ["experiment=gpt2_dp"], ["experiment=brats_rev", "profiler.compare=[]"]


@pytest.mark.parametrize("name", sorted(options("adapter")))
def test_every_adapter_composes(name):
    config = to_objects(compose([*TEXT, f"adapter={name}"]))
    assert config.adapter.kind == name
    if name in ("none", "bitfit"):
        assert to_objects(compose([*IMAGES, f"adapter={name}"])).adapter.kind == name
    else:
        with pytest.raises(
            ConfigError, match=f"adapter={name} does not fit model=rev_unet; give adapter=bitfit or none"
        ):
            compose([*IMAGES, f"adapter={name}"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["adapter=lor"], r"adapter=lor is not known.*did you mean lora"),
        (["adapter=lora", "adapter.rank=0"], r"adapter\.rank is 0; it must be at least 1"),
        (["adapter=lora", "adapter.dropout=1"], r"adapter\.dropout is 1\.0; it must be at least 0 and at most 0\.99"),
        (["adapter=lora", "adapter.bias=some"], r"adapter\.bias is 'some'; choose one of none, all, lora_only"),
        (["adapter=lora", "adapter.init=pissa"], r"adapter\.init is 'pissa'; choose one of default, gaussian"),
        (
            ["adapter=prompt", "adapter.rank=3"],
            r"adapter\.rank is not a key of adapter=prompt; it is a key of adapter=d",
        ),
        (["adapter=prompt", "adapter.merge=true"], r"adapter\.merge is not a key of adapter=prompt; it is a key of ad"),
        (
            ["adapter=prefix", "adapter.merge=true"],
            r"adapter\.merge is not a key of adapter=prefix; it is a key of ada",
        ),
        (["adapter=prefix", "adapter.projection_size=8"], r"adapter\.projection_size is for adapter\.projection=true"),
        (
            ["adapter=prefix", "memory=checkpoint"],
            r"adapter=prefix does not work with memory=checkpoint; give memory=s",
        ),
        (["adapter=prefix", "profiler.compare=[checkpoint]"], r"give memory=stored, and profiler\.compare=\[stored\]"),
        (
            ["adapter=dora", "memory=checkpoint"],
            r"adapter=dora does not work with memory=checkpoint and privacy=ghost;",
        ),
        (["adapter=frozen", "adapter.parts=[tail]"], r"adapter\.parts is 'tail'; choose one of embeddings, head"),
        (["adapter=frozen", "adapter.parts=[]"], r"adapter\.parts is empty; give adapter\.parts=\[embeddings,head\]"),
        (["adapter=lora", "model.random=true"], r"adapter=lora releases no model; give adapter=none"),
    ],
)
def test_a_wrong_option_gives_one_sentence(overrides, words):
    with pytest.raises(ConfigError, match=words) as caught:
        compose([*TEXT, *overrides])
    assert "\n" not in str(caught.value)


def test_checkpoints_and_dora_go_together_without_privacy():
    assert to_objects(compose([*TEXT, "adapter=dora", "memory=checkpoint", "privacy=none", "profiler.compare=[]"]))


def test_random_weights_are_those_of_the_seed(base):
    torch.manual_seed(5)
    model = with_random_weights(from_folder(base))
    torch.manual_seed(5)
    again = with_random_weights(from_folder(base))
    assert not torch.equal(model.lm_head.weight, from_folder(base).lm_head.weight)
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)


def test_a_model_from_a_folder_is_named_by_its_whole_path(base, tmp_path, monkeypatch):
    copied = shutil.copytree(base, tmp_path / "base")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), eos_token="a", pad_token="b")
    tokenizer.save_pretrained(copied)
    monkeypatch.chdir(tmp_path)
    model, _ = load_pretrained("base", Purpose("causal"))
    assert model.name_or_path == str(copied)


def _tokenizer():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))


def test_the_memory_mode_reaches_the_model_inside():
    model = Lora().apply(rev_gpt2())
    set_memory(model, "checkpoint")
    assert model.get_base_model().memory == "checkpoint" and "memory" not in vars(model)
