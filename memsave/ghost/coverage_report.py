"""The report of `coverage`: one row for each trainable parameter, and one sentence for each refusal."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch

from memsave.ghost.gradient_products import cheapest_form, held_bytes
from memsave.ghost.gradients import FactoredGrad, Gradient, PerSampleGrad, ViewGrad, upcast
from memsave.ghost.refusals import Refusal, sentences_of

EXACT, REFUSED, UNUSED = "exact", "refused", "unused"
FORMED, GRAM, LOOKUP = "formed gradient", "Gram matrix", "look-up"
HEADER = ("parameter", "shape", "layer", "used by", "verdict", "norm from", "bytes per example")


@dataclass(frozen=True)
class Use:
    """One use of a parameter in the forward, and what the clipper keeps of it between the norm and the sum."""

    form: str
    """How the norm is found: from a Gram matrix, from a formed gradient, or by a look-up."""
    bytes_per_example: int
    positions: int | None = None
    """T, if activations and output gradients are known at T positions; None if the gradient is always formed."""
    one_hot: bool = False
    """Whether the activations are the indices of one-hot vectors."""

    @classmethod
    def of(cls, gradient: Gradient) -> "Use":
        """The use that has these per-example gradients, whose values are not read."""
        inner = gradient.gradient if isinstance(gradient, ViewGrad) else gradient
        chosen = cheapest_form(gradient, summed=True)
        kept = chosen.gradient if isinstance(chosen, ViewGrad) else chosen
        form = FORMED if isinstance(kept, PerSampleGrad) else LOOKUP if kept.one_hot else GRAM
        if isinstance(inner, PerSampleGrad):
            return cls(form, held_bytes(chosen) // max(1, len(inner.values)))
        batch, length, _, _ = inner.sizes()
        return cls(form, held_bytes(chosen) // max(1, batch), length, inner.one_hot)

    @classmethod
    def formed(cls, shape: Sequence[int], dtype: torch.dtype) -> "Use":
        """A use whose gradient is formed."""
        return cls(FORMED, prod(shape) * upcast(torch.empty(0, dtype=dtype)).element_size())

    def with_shape(self, shape: Sequence[int], dtype: torch.dtype, *, batch_size: int) -> "Use":
        """The same use of a parameter of another shape."""
        if self.positions is None or len(shape) < 2:
            return self.formed(shape, dtype)
        rows, columns = shape[-2:]
        grads = torch.empty(batch_size, self.positions, columns if self.one_hot else rows, dtype=dtype, device="meta")
        if self.one_hot:
            index = torch.empty(batch_size, self.positions, dtype=torch.long, device="meta")
            return self.of(FactoredGrad(grads, index, transposed=True, num_embeddings=rows))
        return self.of(FactoredGrad(grads, grads.new_empty(batch_size, self.positions, columns)))


@dataclass(frozen=True)
class ParameterCoverage:
    """One trainable parameter."""

    name: str
    aliases: tuple[str, ...]
    """Its other names, if it is tied."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    layer: str
    """The class of the module that owns it."""
    used_by: tuple[str, ...]
    """The classes of layers with a rule, and the operators, that use it; `operators` if no forward has shown which."""
    verdict: str
    """`exact`, `refused`, or `unused` if the forward did not use it."""
    why: str = ""
    remedy: str = ""
    uses: tuple[Use, ...] = ()
    """In the forward; empty without one."""

    @property
    def elements(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def form(self) -> str:
        """How its norm is found; "" if that is not known."""
        return " + ".join(sorted({use.form for use in self.uses}))

    @property
    def bytes_per_example(self) -> int | None:
        """What the clipper keeps of one example between the norm and the sum, in one pass; None if not known."""
        return sum(use.bytes_per_example for use in self.uses) if self.uses else None

    @property
    def pattern(self) -> str:
        """The name with `*` in place of the numbers of repeated layers."""
        return re.sub(r"(?<![^.])\d+(?![^.])", "*", self.name)

    def as_dict(self) -> dict[str, Any]:
        """The row as values of JSON."""
        found = asdict(self)
        del found["uses"]
        computed = {"elements": self.elements, "form": self.form, "bytes_per_example": self.bytes_per_example}
        return found | {"dtype": str(self.dtype).removeprefix("torch.")} | computed


@dataclass(frozen=True)
class Coverage:
    """Which trainable parameters of a model are clipped exactly; `print` shows it as a table."""

    parameters: tuple[ParameterCoverage, ...]
    refusals: tuple[Refusal, ...]
    """Everything that is refused, also what belongs to no single parameter."""
    forward_ran: bool
    """Whether this is what a forward has shown."""

    @property
    def ok(self) -> bool:
        """Whether nothing is refused."""
        return not self.refusals and not self.with_verdict(REFUSED)

    @property
    def bytes_per_example(self) -> int | None:
        """The sum over all parameters, or None without a forward. Activations that two layers share count twice."""
        known = [each.bytes_per_example for each in self.parameters if each.bytes_per_example is not None]
        return sum(known) if known else None

    def with_verdict(self, verdict: str) -> list[ParameterCoverage]:
        """The parameters with this verdict."""
        return [each for each in self.parameters if each.verdict == verdict]

    def as_dict(self) -> dict[str, Any]:
        """The report as values of JSON."""
        return {
            "ok": self.ok,
            "forward_ran": self.forward_ran,
            "bytes_per_example": self.bytes_per_example,
            "parameters": [each.as_dict() for each in self.parameters],
            "refusals": [asdict(each) for each in self.refusals],
        }

    def __str__(self) -> str:
        lines = _aligned([HEADER, *map(_cells, _merged(self.parameters))])
        lines += ["", *map(self._total, (EXACT, REFUSED, UNUSED))]
        if self.bytes_per_example is not None:
            lines.append(f"kept per example between the norm and the sum: {_format_bytes(self.bytes_per_example)}")
        if not self.forward_ran:
            lines.append("no forward ran: it may refuse more, and shows the operators and the bytes")
        return "\n".join([*lines, *(f"- {each}" for each in sentences_of(self.refusals))])

    def _total(self, verdict: str) -> str:
        found = self.with_verdict(verdict)
        return f"{verdict:<8} {len(found):>6,} parameters {sum(each.elements for each in found):>18,} elements"


def _merged(parameters: Iterable[ParameterCoverage]) -> list[list[ParameterCoverage]]:
    """Parameters that differ only in the numbers of repeated layers."""
    groups: dict[Any, list[ParameterCoverage]] = {}
    for each in parameters:
        key = (each.pattern, each.shape, each.layer, each.used_by, each.verdict, each.why, each.form)
        groups.setdefault((*key, each.bytes_per_example, each.aliases), []).append(each)
    return list(groups.values())


def _cells(group: list[ParameterCoverage]) -> tuple[str, ...]:
    first = group[0]
    name = f"{first.pattern} x {len(group)}" if len(group) > 1 else " = ".join([first.name, *first.aliases])
    kept = "-" if first.bytes_per_example is None else _format_bytes(first.bytes_per_example)
    used_by = ", ".join(first.used_by) or "-"
    shape = " x ".join(map(str, first.shape)) or "()"
    return name, shape, first.layer, used_by, first.verdict, first.form or "-", kept


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _format_bytes(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
