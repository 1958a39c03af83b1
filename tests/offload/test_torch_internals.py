"""The private API of PyTorch that the package uses behaves as the package assumes."""

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from memsave.offload import _torch_internals as internals


def test_no_mode_sees_what_runs_unobserved():
    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append("function")
            return func(*args, **(kwargs or {}))

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append("operator")
            return func(*args, **(kwargs or {}))

    seen, x = [], torch.ones(2, requires_grad=True)
    with Functions(), Operators():
        x * 2
        assert set(seen) == {"function", "operator"}
        seen.clear()
        with internals.unobserved():
            assert not (x * 2).requires_grad
        assert not seen
        x * 2
        assert set(seen) == {"function", "operator"}


@pytest.mark.parametrize("mode", [None, FakeTensorMode()])
def test_a_version_counter_follows_the_tensor_without_its_memory(mode):
    with mode or torch.no_grad():
        x = torch.zeros(100)
        storage = weakref.ref(x.untyped_storage())
        counter, version = internals.version_counter(x), internals.version_of(x)
        assert internals.version_of(counter) == version
        x[1:].add_(1)
        assert internals.version_of(counter) == version + 1
        assert counter.untyped_storage().nbytes() == 0
        del x
    assert storage() is None


@pytest.mark.parametrize("fake", [False, True])
def test_a_view_of_a_storage_keeps_it_only_as_long_as_it_lives(fake):
    with FakeTensorMode() if fake else torch.no_grad():
        x = torch.arange(12.0)
        storage = x.untyped_storage()
        view = internals.view_of(storage, x, dtype=torch.float32, offset=2, size=(2, 3), stride=(4, 1))
        assert view.untyped_storage() is storage
        assert (view.shape, view.stride(), view.storage_offset()) == ((2, 3), (4, 1), 2)
        assert (internals.fake_mode_of(view) is not None) == fake
        assert fake or view.tolist() == [[2, 3, 4], [6, 7, 8]]
        dead = weakref.ref(storage)
        del x, storage, view
    assert dead() is None


def test_the_storage_id_is_that_of_all_views():
    x, y = torch.zeros(4), torch.zeros(4)
    assert internals.storage_id(x) == internals.storage_id(x[1:]) != internals.storage_id(y)


def test_plain_types_exclude_parameters():
    assert type(torch.zeros(1)) in internals.PLAIN_TYPES
    assert torch.nn.Parameter not in internals.PLAIN_TYPES
