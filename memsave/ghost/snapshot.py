"""A snapshot of the buffers and parameters, which a forward must not change.

A buffer or a parameter that the forward changes may contain information about the examples, and no noise is added to
it. In-place operations increase a tensor's version. Writes through `.data` do not, so values are compared, too: all
values of a small buffer, and a sample of any other tensor.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memsave.ghost import _torch_internals as internals
from memsave.ghost.late_checks import LateChecks
from memsave.ghost.refusals import Refusal

WHOLE = 2**16  # elements of the largest buffer that is compared completely
SAMPLE = 2**4  # elements compared of any other tensor


@dataclass(frozen=True)
class _Entry:
    kind: str
    name: str
    registry: dict[str, Any]
    key: str
    tensor: Tensor
    version: int | None
    """Its in-place counter; None if that may change."""
    geometry: tuple[Any, ...]
    sample: Tensor
    """A view of the compared elements."""


class StateSnapshot:
    """The buffers and parameters of a model before a forward; `modules` are the model's modules with their names.

    `shard_of`: the data of this process of a sharded parameter. The module has another copy of it while it computes,
    and what a forward writes into that copy is lost. `earlier`: a snapshot whose views of elements are used again.
    """

    def __init__(
        self,
        modules: Iterable[tuple[str, nn.Module]],
        *,
        shard_of: Callable[[Tensor], Tensor | None] = lambda _: None,
        earlier: "StateSnapshot | None" = None,
    ):
        self.entries: list[_Entry] = []
        known = {} if earlier is None else {id(each.tensor): each for each in earlier.entries}
        self._buffers: list[tuple[str, nn.Module, set[str]]] = []
        """By module, the names of the buffers in its state_dict."""
        modules = list(modules)
        seen, rewritten = set(), _rewritten(module for _, module in modules)
        for path, module in modules:
            self._buffers.append((path, module, _persistent(module)))
            for kind, registry in (
                ("parameter", internals.own_parameters(module)),
                ("buffer", internals.own_buffers(module)),
            ):
                for key, tensor in registry.items():
                    if tensor is None or id(tensor) in seen:
                        continue
                    seen.add(id(tensor))
                    shard = shard_of(tensor)
                    if shard is not None:
                        registry, tensor = {key: shard}, shard
                    name, size = f"{path}.{key}" if path else key, WHOLE if kind == "buffer" else SAMPLE
                    version = None if id(tensor) in rewritten else internals.version(tensor)
                    before, geometry = known.get(id(tensor)), _geometry(tensor)
                    same = before is not None and before.tensor is tensor and before.geometry == geometry
                    sample = before.sample if before is not None and same else _sample(tensor, size)
                    self.entries.append(_Entry(kind, name, registry, key, tensor, version, geometry, sample))
        self._values = _concatenated([each.sample for each in self.entries])

    def changes(self, late: LateChecks) -> list[Refusal]:
        """A refusal for each buffer and parameter that is another tensor now, or has other values.

        Values of a GPU are compared by `late`.
        """
        changed = [
            each
            for each in self.entries
            if each.registry.get(each.key) is not each.tensor
            or each.version not in (None, internals.version(each.tensor))
        ]
        samples = []
        for each in self.entries:
            sample = each.sample
            if _geometry(each.tensor) != each.geometry:
                sample = _sample(each.tensor, each.sample.numel())
            if (sample.shape, sample.dtype, sample.device) != (
                each.sample.shape,
                each.sample.dtype,
                each.sample.device,
            ):
                changed.append(each)
                sample = each.sample
            samples.append(sample)
        found = [_changed(each.kind, each.name) for each in changed]
        for key, now in _concatenated(samples).items():
            same = _equal(now, self._values[key])
            mine = [each for each in self.entries if (each.sample.device, each.sample.dtype) == key]
            found += late.add(same.all(), partial(_differing, mine, same))
        for path, module, before in self._buffers:
            added = sorted(_persistent(module) - before)
            found += [_changed("buffer", f"{path}.{key}" if path else key) for key in added]
        return found


def _changed(kind: str, name: str) -> Refusal:
    return Refusal(
        name,
        "",
        f"is a {kind} that the forward changed: it may contain information about the examples, and would be released "
        f"without noise",
        "keep it unchanged while training, for instance with the module that changes it in eval mode",
    )


def _differing(entries: list[_Entry], same: Tensor) -> list[Refusal]:
    """A refusal for each entry with an element of its sample that is not the same; `same`: their samples in a row."""
    parts = same.split([each.sample.numel() for each in entries])
    return [_changed(each.kind, each.name) for each, part in zip(entries, parts, strict=True) if not part.all()]


def _rewritten(modules: Iterable[Any]) -> set[int]:
    """The parameters that PEFT's LoRA on parameters writes with their own values, where it parametrises them."""
    found = set()
    for module in modules:
        if type(module).__name__ == "ParamWrapper" and hasattr(module, "parameter_name"):
            base: Any = module.get_base_layer()
            found.add(id(getattr(base, module.parameter_name, None)))
    return found


def _persistent(module: nn.Module) -> set[str]:
    left_out = internals.non_persistent_buffers(module)
    return {key for key, buffer in internals.own_buffers(module).items() if buffer is not None and key not in left_out}


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    """Which elements of which storage the tensor has; an assignment to `.data` changes it."""
    if tensor.layout != torch.strided:
        return ()
    return internals.storage_id(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _sample(tensor: Tensor, size: int) -> Tensor:
    """About `size` evenly spread elements; none of a sparse or quantised tensor."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_quantized:
        return torch.zeros(0)
    if not tensor.is_contiguous():
        tensor = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    flat = tensor.reshape(-1)  # a view, where the elements are dense
    return flat[:: max(1, flat.numel() // size)][:size]


def _concatenated(samples: list[Tensor]) -> dict[tuple[torch.device, torch.dtype], Tensor]:
    """A copy of all samples, in one tensor for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for each in samples:
        groups.setdefault((each.device, each.dtype), []).append(each)
    return {key: torch.cat(found) for key, found in groups.items()}


def _equal(one: Tensor, other: Tensor) -> Tensor:
    """Where values are equal; NaN equals NaN."""
    return (one == other).logical_or_((one != one).logical_and_(other != other))
