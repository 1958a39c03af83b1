"""All private API of PyTorch that `memsave.models` uses, in one place; tests/models/test_torch_internals.py."""

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether torch.func transforms or forward-mode AD are active; a custom Function does not support them by itself.

    There is no public test for either.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


DisableTorchFunction = torch._C.DisableTorchFunctionSubclass
"""Context manager: operations inside `__torch_function__` do not call it again.

The documented names are `torch._C.DisableTorchFunctionSubclass` and `super().__torch_function__`; the latter would
convert results to the subclass.
"""
