"""The cache of calibrations, shared by the tests of a module."""

import pytest


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cache(shared_cache, monkeypatch):
    """One cache for all tests of a module."""
    monkeypatch.setenv("MEMSAVE_CACHE", str(shared_cache))
