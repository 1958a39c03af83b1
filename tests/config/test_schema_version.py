"""`config.yaml` of a run: its schema version, and files of other versions."""

import pytest

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
    path.write_text(path.read_text().replace("kind: phantom", "kind: sst2"))
    with pytest.raises(ConfigError, match=r"data=sst2 is not registered: install the package that adds it"):
        load(path)
