"""What a forward must leave as it is: buffers and parameters.

A buffer or a parameter that the forward changes may hold something of the examples, and no noise is added to it.
In-place operations raise a tensor's version. Writes through `.data` do not, so values are compared, too: all of a small
buffer, and a checksum of a sample of any other tensor.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memsave.ghost.gradients import has_values
from memsave.ghost.refusals import Refusal

WHOLE = 2**16  # elements of the largest buffer that is copied and compared
SAMPLE = 2**6  # elements in the checksum of any other tensor


@dataclass(frozen=True)
class _Watched:
    kind: str
    name: str
    tensor: Tensor
    version: int
    copy: Tensor | None
    checksum: Tensor


class Snapshot:
    """The buffers and parameters of a model before a forward."""

    def __init__(self, model: nn.Module):
        self._watched = [
            _Watched(kind, name, t, t._version, _copy(t) if kind == "buffer" else None, _checksum(t))
            for kind, name, t in _tensors(model)
        ]

    def changes(self, model: nn.Module) -> list[Refusal]:
        """A refusal for each that is another tensor now, or has other values."""
        current = {(kind, name): tensor for kind, name, tensor in _tensors(model)}
        same = [_same(_checksum(each.tensor), each.checksum) for each in self._watched]
        alike = torch.stack([each.to(same[0].device) for each in same]) if same else torch.ones(0)
        return [
            Refusal(
                each.name,
                "",
                f"is a {each.kind} that the forward changed: it may hold something of the examples then, and would be "
                f"released without noise",
                "keep it as it is while training, for instance with the module that changes it in eval mode",
            )
            for each, unchanged in zip(self._watched, alike.tolist() if has_values(alike) else same, strict=True)
            if unchanged is False or _replaced(each, current.get((each.kind, each.name)))
        ]


def _tensors(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    for name, parameter in model.named_parameters():
        yield "parameter", name, parameter
    for name, buffer in model.named_buffers():
        yield "buffer", name, buffer


def _replaced(before: _Watched, now: Tensor | None) -> bool:
    """Whether it is another tensor, was written in place, or is a small buffer with another value."""
    if now is None or now is not before.tensor or now._version != before.version:
        return True
    return before.copy is not None and has_values(now) and not bool(_same(now.detach(), before.copy).all())


def _copy(tensor: Tensor) -> Tensor | None:
    return tensor.detach().clone() if tensor.numel() <= WHOLE else None


def _checksum(tensor: Tensor) -> Tensor:
    """The sum of evenly spread elements; of a layout that has none to read, zero."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_quantized:
        return torch.zeros(())
    by_stride = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    flat = tensor.permute(by_stride).reshape(-1)  # without a copy, where the elements are dense
    sample = flat[:: max(1, -(-len(flat) // SAMPLE))]
    if sample.is_complex():
        sample = torch.view_as_real(sample)
    return sample.sum(dtype=torch.float32 if tensor.device.type == "mps" else torch.float64)


def _same(one: Tensor, other: Tensor) -> Tensor:
    """Where values are the same; NaN is the same as NaN."""
    return (one == other).logical_or_((one != one).logical_and_(other != other))
