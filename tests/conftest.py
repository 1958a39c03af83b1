"""One thread a process, set before torch is loaded: tensors are small, and tests run side by side. And a tiny run."""

import json
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run two steps of a tiny brats_rev in this process; returns (exit code, result, folder)."""
    from memsave.compose import compose
    from memsave.run import execute
    from tests.training.test_segmentation import TINY

    monkeypatch.setenv("MEMSAVE_CACHE", str(tmp_path / "cache"))

    def call(*overrides, name="run"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        config = compose([*TINY, "trainer.steps=2", "profiler.compare=[]", *overrides])
        code = execute(config, folder, experiment="brats_rev")
        return code, json.loads((folder / "result.json").read_text()), folder

    return call
