"""Loading trained models from a run's folder and from a copy of its `model/`."""

import json
import re
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

pytest.importorskip("nibabel")
pytest.importorskip("monai")
pytest.importorskip("transformers")

import memsave
from memsave.config import ConfigError
from memsave.config.compose import load as load_config
from memsave.config.schema import TrainerConfig
from memsave.data.text.config import VisitsData
from memsave.data.text.records import Record
from memsave.data.text.visits import private_records, public_records
from memsave.experiment import make_model
from memsave.predict import main
from memsave.tasks.language.generation import Generation, GenerationConfig
from memsave.tasks.language.small_gpt2 import RevGPT2, SmallGPT2, small_gpt2, train_tokenizer

SIZES = {"layers": 2, "heads": 2, "width": 16, "vocabulary": 400, "positions": 200}
PAGE = Path(__file__).parents[1] / "docs" / "using.md"


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the run's `model/` only."""
    return Path(shutil.copytree(trained[0] / "model", tmp_path / "elsewhere" / "copy"))


@pytest.fixture
def older(trained, tmp_path):
    """A copy of the run in the format of versions without `config.json`."""
    run = Path(shutil.copytree(trained[0], tmp_path / "older"))
    (run / "model" / "config.json").unlink()
    return run


@pytest.fixture(scope="module")
def expected(trained):
    """(a volume, its logits from the network of the run's config.yaml)"""
    from safetensors.torch import load_file

    network, _ = make_model(load_config(trained[0] / "config.yaml"))
    network.load_state_dict(load_file(trained[0] / "model" / "model.safetensors"))
    image = torch.randn(1, 4, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return image, network.eval()(image)


def is_expected(network, expected):
    with torch.no_grad():
        return not network.training and torch.equal(network(expected[0]), expected[1])


def test_a_unet_is_loaded_from_a_run_or_a_copied_folder(trained, copied, expected):
    for folder in (trained[0], str(trained[0]), trained[0] / "model", trained[0] / "checkpoint", copied):
        network = memsave.load(folder)
        assert is_expected(network, expected), folder
        assert list(network.config.modalities) == ["t1", "t1ce", "t2", "flair"]
        assert network.config.regions.names == ("wt", "tc", "et") and network.config.crop_size == [16, 16, 16]


def test_the_config_describes_the_network_without_paths(trained, copied):
    text = (copied / "config.json").read_text()
    content = json.loads(text)
    assert content["regions"] == {"wt": [1, 2, 4], "tc": [1, 4], "et": [4]} and content["labels"]["2"] == "edema"
    assert content["spacing"] is None and "z-score" in content["normalisation"]
    assert content["model"]["channels"] == [8, 16] and content["model"]["memory"] == "reversible"
    assert not any(str(folder) in text for folder in trained) and "/" not in text


def test_a_copied_folder_gives_the_predictions_of_the_run(trained, copied, tmp_path):
    for name, folder in (("run", trained[0]), ("copy", copied)):
        assert main([f"checkpoint={folder}", f"input={trained[1]}", f"output={tmp_path / name}"]) == 0
    files = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert len(files) == 4
    for name in files:
        run, copy = (np.asarray(nibabel.load(tmp_path / each / name).dataobj) for each in ("run", "copy"))
        assert np.array_equal(run, copy)


def test_an_older_run_is_loaded_by_its_own_config(older, expected, tmp_path):
    for folder in (older, older / "model", older / "checkpoint"):
        assert is_expected(memsave.load(folder), expected), folder
    alone = Path(shutil.copytree(older / "model", tmp_path / "elsewhere" / "alone"))
    with pytest.raises(
        ConfigError, match=r"alone holds weights without their config\.json; give a run's folder, which"
    ):
        memsave.load(alone)
    shutil.copy(older / "config.yaml", alone)
    assert is_expected(memsave.load(alone), expected)
    shutil.rmtree(older / "model")  # as after an interrupted run
    assert is_expected(memsave.load(older), expected)


def change(**values):
    def apply(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return apply


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda folder: (folder / "config.json").write_text("{"),
            r"config\.json cannot be read \(.*\); copy the model's",
        ),
        (
            lambda folder: (folder / "config.json").write_text("{}"),
            r"config\.json has no usable 'kind'; copy the model's",
        ),
        (change(kind="other"), r"its kind is 'other' and should be 'rev_unet'"),
        (change(modalities=["t1"]), r"its channels do not match its modalities and regions"),
        (change(scheme="none"), r"has no usable 'none'"),
        (
            change(model={"in_channels": 4, "out_channels": 3, "channels": [3]}),
            r"cannot be built \(channels are \[3\];",
        ),
        (change(model={"in_channels": 4, "out_channels": 3}), r"safetensors cannot be read as the model of its config"),
        (
            lambda folder: (folder / "model.safetensors").write_text(""),
            r"safetensors cannot be read as the model of its",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), r"copy holds no model\.safetensors; copy the"),
    ],
)
def test_a_damaged_folder_gives_a_one_sentence_error(copied, damage, words):
    damage(copied)
    with pytest.raises(ConfigError, match=words) as caught:
        memsave.load(copied)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_reported(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no trained model; give a run's folder, which has config\.yaml, or a"):
        memsave.load(tmp_path)


@pytest.fixture(scope="module", params=[SmallGPT2, RevGPT2])
def written(request, tmp_path_factory):
    """(a run's folder with an untrained language model, its task, the model)"""
    sizes = request.param(**SIZES)
    tokenizer = train_tokenizer([each.completion for each in public_records(200)], size=sizes.vocabulary)
    model = small_gpt2(sizes, tokenizer)
    data = VisitsData(max_length=90)
    known = {"data": data, "task": GenerationConfig(beams=2), "trainer": TrainerConfig(), "device": torch.device("cpu")}
    task = Generation(private_records(5), private_records(2, seed=1), tokenizer, **known)
    folder = tmp_path_factory.mktemp("text")
    task.release(model, folder / "model")
    return folder, task, model


def test_a_language_model_is_loaded_as_by_transformers(written, tmp_path):
    folder, _, model = written
    copy = shutil.copytree(folder / "model", tmp_path / "copy")
    ids = torch.randint(0, 300, (2, 9))
    for each in (folder, folder / "model", copy):
        loaded = memsave.load(each)
        assert type(loaded) is type(model) and not loaded.training and loaded.dtype == torch.float32
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-6)


def test_the_prompt_has_the_tokens_of_training(written):
    from transformers import AutoTokenizer

    from memsave.data.text.encode import encode_records

    folder, task, _ = written
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    prompt = json.loads((folder / "model" / "prompt.json").read_text())
    for record in private_records(20):
        ([row],), _ = encode_records([record], task.tokenizer, max_length=10**6)
        start, options = row.labels.count(-100), {"add_special_tokens": prompt["add_special_tokens"]}
        for part, tokens in (("prompt", row.ids[:start]), ("completion", row.ids[start:])):
            text = prompt[part].format(prompt=record.prompt, completion=record.completion)
            assert tokenizer(text, **options).input_ids == tokens
    record = Record("near[the river], " * 50, "Long.")
    ([row],), _ = encode_records([record], tokenizer, max_length=task.data.max_length)
    assert prompt["max_prompt_tokens"] == row.labels.count(-100) - 1  # without its end token


def test_a_language_model_is_refused_for_segmentation(written, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    assert main([f"checkpoint={written[0]}", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}"]) == 2
    assert "holds a language model, not a U-Net; give a run of task=segmentation" in capsys.readouterr().err


def test_the_segmentation_code_of_the_page_runs(trained, capsys):
    code, _ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(code.replace("outputs/brats_rev/TIME", str(trained[0])).replace("/my/new", str(trained[1])), {})
    assert len(re.findall(r"\{'wt': \d+, 'tc': \d+, 'et': \d+\}", capsys.readouterr().out)) == 4


def test_the_generation_code_of_the_page_gives_the_text_of_the_run(written, capsys):
    folder, task, model = written
    _, code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(code.replace("outputs/gpt2_dp/TIME", str(folder)), {})
    (table,) = re.findall(r'table = "(.*)"', code)
    told = capsys.readouterr().out.strip()
    assert told and told == task.write(model, [table])[table]
