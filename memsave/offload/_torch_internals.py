"""All private API of PyTorch that `memsave.offload` uses, in one place; tests/offload/test_torch_internals.py."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

PLAIN_TYPES = (Tensor, FakeTensor)
"""The classes of tensors without a structure of their own; Parameters and wrappers of other tensors are not in it."""


@contextmanager
def unobserved() -> Iterator[None]:
    """Context manager: no mode sees the operators inside; there is no public way to leave all modes.

    A memory recorder, for example, would count host memory, and an operator trace would follow the copies.
    """
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        yield


def version_of(tensor: Tensor) -> int:
    """The number of in-place changes so far; no public API tells whether a tensor was changed in place."""
    return tensor._version


def storage_id(tensor: Tensor) -> int:
    """The address of the tensor's storage object; FakeTensors and empty tensors have no useful `data_ptr`."""
    return tensor.untyped_storage()._cdata


def fake_mode_of(tensor: Tensor) -> FakeTensorMode | None:
    """The mode of a fake tensor, which has a shape and no values; None for any other tensor."""
    return tensor.fake_mode if isinstance(tensor, FakeTensor) else None


def version_counter(tensor: Tensor) -> Tensor:
    """An empty tensor that shares the version counter of `tensor` and not its memory.

    Autograd itself does not check the versions of tensors that saved-tensor hooks replace.
    """
    counter = tensor.detach()
    counter.data = counter.new_empty(0)
    return counter


def view_of(
    storage: torch.UntypedStorage,
    like: Tensor,
    *,
    dtype: torch.dtype,
    offset: int,
    size: Sequence[int],
    stride: Sequence[int],
) -> Tensor:
    """A tensor that views the storage, with an offset in elements; a fake one if `like` is."""
    empty, mode = like.new_empty(0, dtype=dtype), fake_mode_of(like)
    with nullcontext() if mode is None else _uncached(mode):
        return empty.set_(storage, offset, size, stride)


@contextmanager
def _uncached(mode: FakeTensorMode) -> Iterator[None]:
    """Context manager: the mode does not remember operators, and with them the storages that they got."""
    enabled, mode.cache_enabled = mode.cache_enabled, False
    try:
        yield
    finally:
        mode.cache_enabled = enabled
