"""The private API of PyTorch that the package uses behaves as the package assumes."""

import torch
from torch.autograd import forward_ad

from memsave.models import _torch_internals as internals


def test_transforms_and_forward_mode_are_detected_while_they_are_active():
    seen = []

    def function(x):
        seen.append(internals.is_transformed())
        return x.sin().sum()

    x = torch.ones(2)
    torch.func.grad(function)(x)
    torch.func.vmap(function)(x[None])
    with forward_ad.dual_level():
        function(x)
    function(x)
    assert seen == [True, True, True, False]


def test_operations_in_the_context_do_not_call_torch_function_and_return_plain_tensors():
    calls = []

    class Counted(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            calls.append(func)
            with internals.DisableTorchFunction():
                return func(*args, **(kwargs or {}))

    found = torch.ones(2).as_subclass(Counted) + 1
    assert len(calls) == 1 and type(found) is torch.Tensor
