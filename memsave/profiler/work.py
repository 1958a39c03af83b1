"""The work of a step: FLOPs and bytes moved of each operator, counted on fake or real tensors.

The bytes of a call are those of all its tensors, arguments and results, except arguments whose name starts with
"scratch", in which an operator computes (`memsave.models.operators`); a view moves none. FLOPs are those of products
(`torch.utils.flop_counter`), convolutions and attention (the formulas below, which know groups and every backend).
Copies to host memory and back, which no dispatch mode sees, count as two further kinds.
"""

from collections.abc import Callable
from functools import cache, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from memsave.host_bytes import TO_DEVICE, TO_HOST
from memsave.profiler._torch_internals import reads_device
from memsave.profiler.ledger import tensors_in

COPIES = (TO_HOST, TO_DEVICE)
"""The kinds of copies of `memsave.offload`."""
FRESH_BYTES = 32 * 2**20
"""Results from this size on take new pages from the system (the largest threshold of glibc's malloc)."""


class Work(NamedTuple):
    """The work of calls of one kind of operator; the sum of two is that of both."""

    calls: float = 0
    flops: float = 0
    bytes: float = 0
    fresh_bytes: float = 0
    """Of results of at least `FRESH_BYTES`."""

    def plus(self, other: "Work", *, times: float = 1) -> "Work":
        """This work and `times` the other."""
        return Work(*(own + times * its for own, its in zip(self, other, strict=True)))


Totals = dict[str, Work]
"""The work of a step by kind of operator."""


def added(totals: Totals, others: Totals, *, times: float = 1) -> Totals:
    """The sum of two totals, the second `times` as often."""
    empty = Work()
    return {
        kind: totals.get(kind, empty).plus(others.get(kind, empty), times=times)
        for kind in dict.fromkeys([*totals, *others])
    }


class WorkCounter:
    """Adds up the work of operators, by label and kind; `MemoryRecorder(..., observe=counter)` calls it.

    label: called at each operator; returns where its work counts, as a part of the model.
    """

    def __init__(self, label: Callable[[str | None], str] = lambda module: ""):
        self._label = label
        self.reset()

    def reset(self) -> None:
        """Forget all work."""
        self.sections: list[dict[str, Totals]] = [{}]
        """The work by label: before the first micro-batch, then of each, then after the last; see `next_section`."""

    def __call__(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any, module: Callable[[], Any]) -> None:
        """Count one call of an operator."""
        if reads_device(func):
            return
        self._count(*work_of(func, args, kwargs, result), module())

    def count_copy(self, direction: str, size: int, module: str | None) -> None:
        """Count a copy of `size` bytes; direction: one of `COPIES`."""
        self._count(direction, Work(calls=1, bytes=size), module)

    def _count(self, kind: str, work: Work, module: str | None) -> None:
        totals = self.sections[-1].setdefault(self._label(module), {})
        totals[kind] = totals.get(kind, Work()).plus(work)

    def next_section(self) -> None:
        """Count the following work apart, as that of the next micro-batch, or after the last one."""
        self.sections.append({})

    @property
    def totals(self) -> dict[str, Totals]:
        """The work of the whole step by label."""
        found: dict[str, Totals] = {}
        for section in self.sections:
            for label, totals in section.items():
                found[label] = added(found.get(label, {}), totals)
        return found

    @property
    def total(self) -> Totals:
        """The work of the whole step."""
        return reduce(added, self.totals.values(), {})


def work_of(func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> tuple[str, Work]:
    """(the kind of the operator, the work of the call)."""
    about = _about(func)
    if about.is_view:
        return "view", Work(calls=1)
    results = list(tensors_in(result))
    sizes = [each.numel() * each.element_size() for each in results]
    read = args[: about.arguments]
    moved = sum(sizes) + sum(map(_read_bytes, tensors_in(read))) + sum(map(_read_bytes, tensors_in(kwargs)))
    fresh = sum(size for size in sizes if size >= FRESH_BYTES) if about.is_new else 0
    variant = ""
    if about.name in CONVOLUTIONS:
        variant, flops = _convolution(about.name, args, result)
    elif about.name.startswith("_scaled_dot_product"):
        flops = _attention(about.name, args)
    else:
        formula = flop_registry.get(func.overloadpacket)
        flops = 0.0 if formula is None else float(formula(*args, **kwargs, out_val=result))
    dtype = str(results[0].dtype).removeprefix("torch.") if results else "none"
    return f"{about.name}{variant} {dtype}", Work(1, flops, moved, fresh)


CONVOLUTIONS = ("convolution", "convolution_backward")


def _convolution(name: str, args: tuple, result: Any) -> tuple[str, float]:
    """(" depthwise", " pointwise" or "", FLOPs) of a convolution or its backward."""
    if name == "convolution":
        weight, transposed, groups, places, products = args[1], args[6], args[8], result, 1
    else:
        weight, transposed, groups, places, products = args[2], args[7], args[9], args[0], sum(map(bool, args[10][:2]))
    if transposed:
        places = args[0] if name == "convolution" else args[1]  # each input voxel meets the whole kernel
    variant = " depthwise" if groups > 1 else " pointwise" if weight[0, 0].numel() == 1 else ""
    return variant, 2.0 * places.numel() * weight[0].numel() * products


def _attention(name: str, args: tuple) -> float:
    """FLOPs of scaled dot-product attention: two products of (S, D) and (T, D) per head, five in its backward."""
    backward = name.endswith("_backward")
    query, key = args[1:3] if backward else args[:2]
    return (5.0 if backward else 2.0) * 2 * query.numel() * key.shape[-2]


def _read_bytes(tensor: Tensor) -> int:
    """The bytes of a tensor, but not those that an expanded one repeats."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride() if tensor.layout is torch.strided else tensor.shape):
        elements *= size if stride else 1
    return elements * tensor.element_size()


class _About(NamedTuple):
    name: str
    is_view: bool
    is_new: bool
    arguments: int
    """Without scratch, which comes last."""


@cache
def _about(func: Any) -> _About:
    """What the schema of an operator says, see `_About`."""
    schema = func._schema
    aliases = [each.alias_info for each in schema.returns if each.alias_info is not None]
    is_view = bool(aliases) and not any(alias.is_write for alias in aliases)
    arguments = sum(not each.name.startswith("scratch") for each in schema.arguments)
    return _About(schema.name.partition("::")[2], is_view, not aliases, arguments)
