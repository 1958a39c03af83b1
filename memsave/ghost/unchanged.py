"""What a forward must leave as it is: buffers and parameters.

A buffer or a parameter that the forward changes may hold something of the examples, and no noise is added to it.
In-place operations raise a tensor's version. Writes through `.data` do not, so values are compared, too: all of a small
buffer, and a sample of any other tensor.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memsave.ghost.gradients import has_values
from memsave.ghost.refusals import Refusal

WHOLE = 2**16  # elements of the largest buffer of which all are compared
SAMPLE = 2**4  # elements that are compared of any other tensor


@dataclass(frozen=True)
class _Watched:
    kind: str
    name: str
    registry: dict[str, Any]
    key: str
    tensor: Tensor
    version: int
    storage: int
    sample: Tensor
    """A view of the elements that are compared."""


class Snapshot:
    """The buffers and parameters of a model's modules, given with their names, before a forward."""

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]):
        self._watched: list[_Watched] = []
        self._buffers: list[tuple[str, nn.Module, set[str]]] = []
        """By module, the names of the buffers that its state holds."""
        seen = set()
        for path, module in modules:
            self._buffers.append((path, module, _persistent(module)))
            for kind, registry in (("parameter", module._parameters), ("buffer", module._buffers)):
                for key, tensor in registry.items():
                    if tensor is None or id(tensor) in seen:
                        continue
                    seen.add(id(tensor))
                    name, size = f"{path}.{key}" if path else key, WHOLE if kind == "buffer" else SAMPLE
                    self._watched.append(
                        _Watched(
                            kind, name, registry, key, tensor, tensor._version, _storage(tensor), _sample(tensor, size)
                        )
                    )
        self._values = _gathered([each.sample for each in self._watched])

    def changes(self) -> list[Refusal]:
        """A refusal for each that is another tensor now, or has other values."""
        changed = [
            each
            for each in self._watched
            if each.registry.get(each.key) is not each.tensor or each.tensor._version != each.version
        ]
        samples = []
        for each in self._watched:
            sample = each.sample
            if _storage(each.tensor) != each.storage:
                sample = _sample(each.tensor, each.sample.numel())
            if (sample.shape, sample.dtype, sample.device) != (
                each.sample.shape,
                each.sample.dtype,
                each.sample.device,
            ):
                changed.append(each)
                sample = each.sample
            samples.append(sample)
        for key, now in _gathered(samples).items():
            same = _same(now, self._values[key])
            if has_values(same) and not same.all():
                mine = [each for each in self._watched if (each.sample.device, each.sample.dtype) == key]
                parts = same.split([each.sample.numel() for each in mine])
                changed += [each for each, part in zip(mine, parts, strict=True) if not part.all()]
        found = [(each.kind, each.name) for each in changed]
        for path, module, before in self._buffers:
            found += [("buffer", f"{path}.{key}" if path else key) for key in sorted(_persistent(module) - before)]
        return [
            Refusal(
                name,
                "",
                f"is a {kind} that the forward changed: it may hold something of the examples then, and would be "
                f"released without noise",
                "keep it as it is while training, for instance with the module that changes it in eval mode",
            )
            for kind, name in found
        ]


def _persistent(module: nn.Module) -> set[str]:
    left_out = module._non_persistent_buffers_set
    return {key for key, buffer in module._buffers.items() if buffer is not None and key not in left_out}


def _storage(tensor: Tensor) -> int:
    """The identity of its storage, which an assignment to `.data` changes."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else 0


def _sample(tensor: Tensor, size: int) -> Tensor:
    """About `size` elements, evenly spread; none of a layout that has none to read."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_quantized:
        return torch.zeros(0)
    if not tensor.is_contiguous():
        tensor = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    flat = tensor.reshape(-1)  # a view, where the elements are dense
    return flat[:: max(1, flat.numel() // size)][:size]


def _gathered(samples: list[Tensor]) -> dict[tuple[torch.device, torch.dtype], Tensor]:
    """A copy of all samples, in one tensor for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for each in samples:
        groups.setdefault((each.device, each.dtype), []).append(each)
    return {key: torch.cat(found) for key, found in groups.items()}


def _same(one: Tensor, other: Tensor) -> Tensor:
    """Where values are the same; NaN is the same as NaN."""
    return (one == other).logical_or_((one != one).logical_and_(other != other))
