"""Functions as operators of PyTorch, `torch.ops.memsave.NAME`.

A fake step of a plan and a recorder of memory see one call and not the blocks in which the function computes. They also
see its scratch, because it is an argument, whose name starts with "scratch".
"""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import TypeVar, cast

import torch
from torch import Tensor

Returned = TypeVar("Returned")
LIBRARY = torch.library.Library("memsave", "FRAGMENT")


def operator(
    *, writes: str | None = None, scratch: Callable[..., tuple[Tensor, ...]] = lambda *_: ()
) -> Callable[[Callable[..., Returned]], Callable[..., Returned]]:
    """Make a function the operator `torch.ops.memsave.NAME`, which changes its argument `writes` and its scratch.

    A caller gives the arguments without the scratch; `scratch` makes it from them.

    `torch.library.custom_op` does the same with a Python kernel for autograd, which takes 0.1 ms of each call; none of
    these needs it, because they run without a graph.
    """

    def register(function: Callable[..., Returned]) -> Callable[..., Returned]:
        name, own = function.__name__, [each for each in signature(function).parameters if each.startswith("scratch")]
        schema = torch.library.infer_schema(function, mutates_args=[*([] if writes is None else [writes]), *own])
        LIBRARY.define(name + schema)
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        made = getattr(torch.ops.memsave, name).default

        @wraps(function)
        def call(*arguments: Tensor | bool) -> Returned:
            return cast(Returned, made(*arguments, *scratch(*arguments)))

        return call

    return register
