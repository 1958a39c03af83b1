"""Fixtures of all tests: the device, and tiny runs. Each process has one thread, set before torch is imported."""

import gc
import json
import os
from itertools import count
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import HealthCheck, settings

# `device` may stay the same for all examples of a hypothesis test
settings.register_profile("memsave", suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("memsave")


_numbers = count()
HOOKS = "memory.engine=hooks"  # half the time of the fused engine, whose many small operations the recorder follows


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Modules and collected tests live until the end: the garbage collector need not visit their objects."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(5000, 10, 10)
        gc.enable()


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request):
    """The name of the device on which the test makes its tensors and modules; PyTorch's default during the test."""
    if request.param == "cpu":  # already the default; setting it would slow down every factory function
        yield "cpu"
    else:
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with exact, torch.device(request.param):
            yield request.param


@pytest.fixture(scope="session", autouse=True)
def _session_cache(tmp_path_factory):
    """Fixtures of modules and of the session write to a cache of the tests, never to the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMSAVE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _quick():
    from tests.support.quick import make_quick

    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        yield


@pytest.fixture(autouse=True)
def _own_cache(_session_cache, monkeypatch):
    """Each test has a ledger of its own; the folder is made when something is written to it."""
    monkeypatch.setenv("MEMSAVE_CACHE", str(Path(os.environ["MEMSAVE_CACHE"]) / f"test-{next(_numbers)}"))


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
        engine = [] if any(each.startswith(("memory=", "memory.engine=")) for each in overrides) else [HOOKS]
        config = compose([*TINY_UNET, "trainer.steps=2", "profiler.compare=[]", *engine, *overrides])
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
    overrides = [*TINY_UNET, f"data.root={data}", "trainer.steps=12", "profiler.compare=[]", HOOKS]
    assert execute(compose(overrides), folder, experiment="brats_rev") == 0
    (phantoms,) = (path for path in data.iterdir() if path.is_dir())
    return folder, phantoms
