"""`config.yaml` of a run: its schema version, and files of other versions."""

import pytest
from omegaconf import OmegaConf

from memsave.config import ConfigError
from memsave.config.compose import VERSION, VERSION_KEY, compose, load, to_objects
from memsave.training.result import write_config

OVERRIDES = ["experiment=brats_rev", "trainer.steps=7", "data.crop_size=[16,16,24]"]


@pytest.fixture
def written(tmp_path):
    config = compose(OVERRIDES)
    write_config(config, tmp_path, experiment="brats_rev")
    return tmp_path / "config.yaml", to_objects(config)


def test_the_file_of_a_run_has_the_version_and_is_read_back(written):
    path, config = written
    assert f"{VERSION_KEY}: {VERSION}" in path.read_text().splitlines()
    assert load(path) == config


def test_a_config_changed_by_a_plan_is_written_and_read_back(tmp_path):
    config = to_objects(compose(OVERRIDES)).changed({"data.crop_size": [32, 32, 48], "trainer.micro_batch_size": 1})
    write_config(config, tmp_path)
    assert load(tmp_path / "config.yaml") == config


def test_a_file_of_the_first_release_without_a_version_is_read(written):
    path, config = written
    path.write_text(path.read_text().replace(f"{VERSION_KEY}: {VERSION}\n", ""))
    assert load(path) == config


@pytest.mark.parametrize("version", [VERSION + 1, 0, "new"])
def test_a_file_of_a_later_version_is_refused(written, version):
    path, _ = written
    path.write_text(path.read_text().replace(f"{VERSION_KEY}: {VERSION}", f"{VERSION_KEY}: {version}"))
    with pytest.raises(
        ConfigError, match=rf"{VERSION_KEY} {version}, and this version of memsave reads up to {VERSION}"
    ):
        load(path)


def test_a_data_set_that_no_package_registers_is_named(written):
    path, _ = written
    path.write_text(path.read_text().replace("kind: phantom", "kind: wikitext"))
    with pytest.raises(ConfigError, match=r"data=wikitext is not registered: install the package that adds it"):
        load(path)


def test_the_task_of_version_2_was_a_name(written):
    path, config = written
    text = path.read_text().replace(f"{VERSION_KEY}: {VERSION}", f"{VERSION_KEY}: 2")
    assert "task:\n  kind: segmentation\n" in text
    path.write_text(text.replace("task:\n  kind: segmentation\n", "task: segmentation\n"))
    assert load(path) == config


def test_table_to_text_of_version_2_is_generation_and_its_keys_were_in_data(tmp_path):
    config = compose(["experiment=gpt2_dp", "task.beams=3", "task.generate=7", "task.evaluate=9"])
    write_config(config, tmp_path, experiment="gpt2_dp")
    path = tmp_path / "config.yaml"
    older = OmegaConf.load(path)
    older[VERSION_KEY], older.task = 2, "table_to_text"
    older.data.update({"beams": 3, "generate": 7, "evaluate": 9})
    for key in ("separator",):
        del older.data[key]
    OmegaConf.save(older, path)
    assert load(path) == to_objects(config)
