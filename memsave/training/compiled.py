"""`trainer.compile=true`: the blocks of a model are compiled by `torch.compile`, each as a whole.

A compiled block must save the same tensors when a reversible sequence evaluates it again. `torch.compile` compiles a
block anew for another memory format of its input, or where autocast caches weights, and may then save other tensors.
Both are therefore the same in every call. Random numbers are those of PyTorch's generators, so dropout is replayed.

Steps whose memory is recorded run the blocks themselves: PyTorch compiles nothing under a dispatch mode, and would
never compile what it met there first.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

VARIANTS = 64
"""Shapes, modes and dtypes for which the code of one class may be compiled before PyTorch gives up, and runs it."""


def compile_blocks(blocks: Iterable[nn.Module], *, backend: Any = "inductor") -> int:
    """Replace the forward of each block by its compiled one; returns the number of blocks.

    Compilation happens in the first call. Blocks of one class and shape share the code. The forward of a block may have
    been replaced before; that function is then compiled.
    """
    import torch._dynamo.config as dynamo  # importing it takes two seconds

    dynamo.recompile_limit = max(dynamo.recompile_limit, VARIANTS)
    found = list(blocks)
    for block in found:
        block.forward = CompiledForward(block, backend=backend)
    return len(found)


class CompiledForward:
    """Calls the compiled forward of a block; its copy is that of a copied block."""

    def __init__(self, block: nn.Module, *, backend: Any):
        self._original = block.forward
        options: dict[str, Any] = {"options": {"fallback_random": True}} if backend == "inductor" else {}
        self._compiled = torch.compile(block.forward, backend=backend, dynamic=False, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own forward, of contiguous tensors."""
        if _is_observed():
            return self._original(*args, **kwargs)
        kind = next((each.device.type for each in args if isinstance(each, Tensor)), "cpu")
        args = tuple(each.contiguous() if isinstance(each, Tensor) else each for each in args)
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        with torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
            return self._compiled(*args, **kwargs)


def _is_observed() -> bool:
    """Whether a dispatch mode, such as a memory recorder, sees the operators; no public function tells."""
    return torch._C._len_torch_dispatch_stack() > 0
