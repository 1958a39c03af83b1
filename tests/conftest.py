"""Fixtures of small runs. One thread per process, set before torch is imported, because tests run in parallel."""

import json
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run two steps of a tiny brats_rev in this process; returns (exit code, result, folder)."""
    from memsave.config.compose import compose
    from memsave.run import execute
    from tests.support.tiny_configs import TINY_UNET

    monkeypatch.setenv("MEMSAVE_CACHE", str(tmp_path / "cache"))

    def call(*overrides, name="run"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        config = compose([*TINY_UNET, "trainer.steps=2", "profiler.compare=[]", *overrides])
        code = execute(config, folder, experiment="brats_rev")
        return code, json.loads((folder / "result.json").read_text()), folder

    return call


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """(folder of a trained segmentation run, folder of its four phantoms), for read-only tests."""
    from memsave.config.compose import compose
    from memsave.run import execute
    from tests.support.tiny_configs import TINY_UNET

    folder, data = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("data")
    overrides = [*TINY_UNET, f"data.root={data}", "trainer.steps=12", "profiler.compare=[]"]
    assert execute(compose(overrides), folder, experiment="brats_rev") == 0
    (phantoms,) = (path for path in data.iterdir() if path.is_dir())
    return folder, phantoms
