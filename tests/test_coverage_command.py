"""`python -m memsave.coverage`: folders and model types, on tensors without memory, without the hub."""

import json
import sys

import pytest

pytest.importorskip("transformers")
from transformers import BertConfig, LlamaConfig, MixtralConfig, ResNetConfig, ViTConfig

from memsave import architectures
from memsave.coverage import examine, main

SIZES = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def without_the_hub(monkeypatch):
    monkeypatch.setattr(architectures, "_why_not_on_the_hub", lambda name: "no connection")


def saved(folder, config):
    config.save_pretrained(folder)
    return str(folder)


def test_a_folder(tmp_path, capsys):
    name = saved(tmp_path, LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=100))
    assert main([name]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"configuration: the folder {tmp_path}\ntask: causal-lm, batch of 2, 16 positions\n")
    assert "model.layers.*.mlp.gate_proj.weight x 3" in printed and "LlamaRMSNorm" in printed
    assert f"lm_head.weight{' ' * 35}" in printed and "Gram matrix" in printed


def test_a_model_type_at_its_real_size_needs_no_memory(capsys):
    assert main(["llama", "--positions", "4"]) == 0
    printed = capsys.readouterr().out
    assert "the default of the model type llama" in printed and "no connection" in printed
    assert "6,738,415,616 elements" in printed


def test_a_model_that_depends_on_values_is_judged_with_values(tmp_path, monkeypatch):
    config = MixtralConfig(**SIZES, num_key_value_heads=2, vocab_size=100, num_local_experts=6)
    found = examine(saved(tmp_path, config))
    assert found.note == "the forward depends on values: the verdicts are of the model with random values"
    monkeypatch.setattr("memsave.coverage.SMALL", 0)
    tiny = examine(saved(tmp_path, config))
    assert tiny.note.endswith("of a tiny copy of the configuration, and the bytes are estimates")
    for report in (found.report, tiny.report):
        rows = {each.name: each for each in report.parameters}
        assert rows["model.layers.2.mlp.experts.down_proj"].shape == (6, 32, 48)
        assert rows["model.layers.2.mlp.experts.down_proj"].used_by and report.forward_ran
    estimate, exact = tiny.report.bytes_per_example, found.report.bytes_per_example
    assert estimate == pytest.approx(exact, rel=0.5)


def test_where_no_forward_runs_the_table_is_by_class_alone(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("the sizes do not fit")

    name = saved(tmp_path, LlamaConfig(**SIZES, vocab_size=100))
    monkeypatch.setattr("memsave.coverage.batch_for", fail)
    found = examine(name)
    assert not found.report.forward_ran and "does not run (the sizes do not fit)" in found.note


def test_a_refusal_has_exit_code_1_and_a_sentence(tmp_path, capsys):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    assert main([saved(tmp_path, config)]) == 1
    printed = capsys.readouterr().out
    assert "task: image-classification" in printed and "replace it by a GroupNorm" in printed


@pytest.mark.parametrize(
    ("config", "task", "expected"),
    [
        (BertConfig(**SIZES, vocab_size=100), None, "masked-lm"),
        (BertConfig(**SIZES, vocab_size=100), "sequence-classification", "sequence-classification"),
        (BertConfig(**SIZES, vocab_size=100), "token-classification", "token-classification"),
        (
            BertConfig(**SIZES, vocab_size=100, architectures=["BertForTokenClassification"]),
            None,
            "token-classification",
        ),
        (ViTConfig(**SIZES, image_size=32, patch_size=8), None, "image-classification"),
    ],
    ids=["masked", "sequence", "token", "named", "image"],
)
def test_tasks(tmp_path, config, task, expected):
    found = examine(saved(tmp_path, config), task=task)
    assert found.task == expected and found.report.forward_ran and found.report.parameters


def test_lora_is_trained_alone_and_json_is_written(tmp_path, capsys):
    pytest.importorskip("peft")
    name, file = saved(tmp_path, LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=100)), tmp_path / "report.json"
    assert main([name, "--adapter", "lora", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert all("lora_" in each["name"] for each in written["parameters"]) and written["ok"]
    assert written["task"] == "causal-lm" and written["adapter"] == "lora" and written["bytes_per_example"] > 0
    assert "lora_A.default.weight x 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/folder"], "/no/such/folder is no folder, no model on the hub that can be reached (no connection)"),
        (["bert", "--task", "seq2seq"], "transformers has no bert for seq2seq; give one of masked-lm"),
        (["wav2vec2"], "transformers has no wav2vec2 for any of seq2seq"),
        ([__file__], "is a file; give the folder that holds config.json"),
    ],
)
def test_errors_are_one_sentence(arguments, message, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("memsave: ") and message in printed and printed.count("\n") == 1


def test_a_folder_without_a_configuration(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "has no configuration that transformers can read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama", "--batch-size", "1"], "--batch-size is 1: give 2 or more"),
        (["llama", "--positions", "0"], "--positions is 0: give 1 or more"),
        (["llama", "--task", "speech"], "invalid choice: 'speech'"),
        ([], "required: NAME"),
    ],
)
def test_bad_arguments_have_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and message in printed and printed.count("\n") == 1


@pytest.mark.parametrize("name", ["transformers", "peft"])
def test_a_library_that_is_not_installed(name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["llama", "--adapter", "lora"]) == 2
    assert capsys.readouterr().err.startswith(f"memsave: {name} is not installed: pip install ")
