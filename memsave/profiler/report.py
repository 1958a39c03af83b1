"""What a recording found: the peak, what it consisted of, and the timeline that led there.

The report is replayed from the ledger's events: memory in state k is memory in state 0 plus the first k changes. Each
change belongs to one category, so the sums by category add up to the total in every state by construction, and the
timeline needs no more than two small numbers per event. Sizes are whole bytes everywhere; KiB, MiB and GiB appear only
in what is printed.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from os import PathLike
from pathlib import Path
from typing import Any

from memsave.profiler.ledger import Block

CATEGORIES = ("parameter", "buffer", "optimizer", "gradient", "input", "activation", "temporary")


def format_bytes(count: int) -> str:
    """A number of bytes for people: `6.30 GiB`."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def parse_bytes(text: str) -> int:
    """The bytes that `16GiB`, `80 GB` or `1.5e9` means; ValueError for anything else."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMGT]i?B|B)?\s*", text, flags=re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is no size; give one such as 16GiB, 80GB or 500MiB")
    number, unit = match[1], (match[2] or "B").upper()
    base = 1024 if "I" in unit else 1000
    try:
        return int(float(number) * base ** "BKMGT".index(unit[0]))
    except ValueError as error:
        raise ValueError(f"{text!r} is no size; give one such as 16GiB, 80GB or 500MiB") from error


@dataclass(frozen=True)
class LiveBlock:
    """One storage of a recording."""

    bytes: int
    """Its size at the peak; in `MemoryReport.history`, the largest that it had."""
    shape: tuple[int, ...]
    dtype: str
    device: str
    module: str | None
    """The module in whose forward or backward it was made, or that owns it ("" is the model); None outside of all."""
    phase: str
    """forward, recompute, backward or optimizer; `before` for what existed before the recording."""
    category: str


@dataclass(frozen=True)
class Timeline:
    """Live bytes by category, one state more than there are events."""

    start: dict[str, int]
    """Bytes by category in state 0."""
    deltas: list[int]
    """The change in bytes of each event."""
    categories: list[int]
    """The category of each event, as an index into `CATEGORIES`."""
    phases: list[tuple[int, str]]
    """(state, phase): the phase of the events from that state on."""
    blocks: list[int]
    """The block of each event, as an index into `MemoryReport.history`."""
    alive: list[tuple[int, int]]
    """(block, bytes) of what lives in state 0."""

    def __len__(self) -> int:
        return len(self.deltas) + 1

    def totals(self) -> list[int]:
        """Live bytes in every state."""
        return list(accumulate(self.deltas, initial=sum(self.start.values())))

    def between(self, first: int, last: int) -> "Timeline":
        """The states from number `first` to number `last`."""
        sizes = Counter(dict(self.alive))
        for block, delta in zip(self.blocks[:first], self.deltas[:first]):
            sizes[block] += delta
        return Timeline(
            alive=[(block, size) for block, size in sorted(sizes.items()) if size],
            start={name: sizes[first] for name, sizes in self.by_category().items()},
            deltas=self.deltas[first:last],
            categories=self.categories[first:last],
            blocks=self.blocks[first:last],
            phases=list({max(0, state - first): phase for state, phase in self.phases if state < last}.items()),
        )

    def by_category(self) -> dict[str, list[int]]:
        """Live bytes in every state, for each category."""
        return {
            name: list(
                accumulate(
                    (delta if code == own else 0 for delta, code in zip(self.deltas, self.categories)),
                    initial=self.start[name],
                )
            )
            for own, name in enumerate(CATEGORIES)
        }


@dataclass(frozen=True)
class MemoryReport:
    """The memory of one recording; `print` it, plot it, or keep it as JSON."""

    peak_bytes: int
    """The most bytes that lived at one moment, with all that existed before the recording."""
    peak_by_category: dict[str, int]
    """Adds up to `peak_bytes` exactly."""
    peak_index: int
    """The first state of the timeline that has the peak."""
    start_bytes: int
    """What lived in state 0: parameters, inputs and whatever else existed before."""
    blocks: list[LiveBlock]
    """What lived at the peak, largest first."""
    history: list[LiveBlock]
    """Every block that lived at any time, in the order in which they were first seen."""
    timeline: Timeline
    allocator_peak_bytes: int | None = None
    """What the allocator took above the start, workspaces included: another quantity, never mixed with the others."""

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "MemoryReport":
        """The inverse of `as_dict`, after a detour through JSON as well."""
        timeline = dict(data["timeline"])
        for key in ("phases", "alive"):
            timeline[key] = [tuple(pair) for pair in timeline[key]]
        lists = {
            key: [LiveBlock(**{**block, "shape": tuple(block["shape"])}) for block in data[key]]
            for key in ("blocks", "history")
        }
        return cls(**{**data, "timeline": Timeline(**timeline), **lists})

    def to_json(self, path: str | PathLike[str]) -> None:
        """Write the report to a file."""
        Path(path).write_text(json.dumps(self.as_dict(), separators=(",", ":")) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | PathLike[str]) -> "MemoryReport":
        """Read a report that `to_json` has written."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def plot(
        self,
        path: str | PathLike[str],
        *,
        title: str | None = None,
        name: str = "",
        others: "Mapping[str, MemoryReport] | None" = None,
    ) -> None:
        """Draw the step, with other reports beside it on the same axis; see `plot_reports`."""
        from memsave.profiler.plot import plot_reports

        plot_reports({name: self, **(others or {})}, path, title=title)

    @property
    def largest_block_bytes(self) -> int:
        """The size of the largest block that the step made for itself, at any time: an activation or a temporary."""
        own = (block.bytes for block in self.history if block.category in ("activation", "temporary"))
        return max(own, default=0)

    def growth(self, since: "MemoryReport | None" = None) -> tuple[str, str | None, int]:
        """(category, module, bytes) of what takes more at the peak than in another report: the most of any.

        The category that grew most, in the module in which it grew most. Without a report to compare with, the largest.
        """
        sizes: Counter[tuple[str, str | None]] = Counter()
        for report, sign in ((self, 1), (since, -1)):
            for block in [] if report is None else report.blocks:
                sizes[block.category, block.module] += sign * block.bytes
        by_category: Counter[str] = Counter()
        for (category, _), size in sizes.items():
            by_category[category] += size
        chosen = max(by_category, key=lambda each: by_category[each], default="temporary")
        inside = {module: size for (category, module), size in sizes.items() if category == chosen}
        module = max(inside, key=lambda each: inside[each], default=None)
        return chosen, module, inside.get(module, 0)

    def __str__(self) -> str:
        lines = [f"peak  {format_bytes(self.peak_bytes)}  (start {format_bytes(self.start_bytes)})"]
        if self.allocator_peak_bytes is not None:
            lines.append(f"allocator, above the start  {format_bytes(self.allocator_peak_bytes)}")
        for name, size in sorted(self.peak_by_category.items(), key=lambda item: -item[1]):
            if size:
                lines.append(f"  {name:<12}{format_bytes(size):>12}{size / self.peak_bytes:>8.1%}")
        lines.append("largest blocks at the peak")
        for block in self.blocks[:5]:
            shape = "x".join(map(str, block.shape)) or "scalar"
            place = "outside" if block.module is None else block.module or "model"
            lines.append(
                f"  {format_bytes(block.bytes):>12}  {block.category:<11} {block.dtype} {shape}  {place}, {block.phase}"
            )
        return "\n".join(lines)


def build_report(
    blocks: list[Block],
    *,
    events: list[tuple[int, int]],
    categories: list[str],
    phases: list[tuple[int, str]],
    allocator_peak_bytes: int | None = None,
) -> MemoryReport:
    """Replay a ledger, whose blocks have the given categories, into a report."""
    codes = [CATEGORIES.index(category) for category in categories]
    start = dict.fromkeys(CATEGORIES, 0)
    for block, category in zip(blocks, categories):
        start[category] += block.start_bytes
    timeline = Timeline(
        start=start,
        deltas=[delta for _, delta in events],
        categories=[codes[block] for block, _ in events],
        phases=list(phases),
        blocks=[block for block, _ in events],
        alive=[(number, block.start_bytes) for number, block in enumerate(blocks) if block.start_bytes],
    )
    totals = timeline.totals()
    peak_bytes = max(totals)
    peak_index = totals.index(peak_bytes)
    sizes = [block.start_bytes for block in blocks]
    largest, at_peak = list(sizes), list(sizes)
    for number, (index, delta) in enumerate(events):
        sizes[index] += delta
        largest[index] = max(largest[index], sizes[index])
        if number < peak_index:
            at_peak[index] = sizes[index]

    def described(sizes: list[int]) -> list[LiveBlock]:
        return [
            LiveBlock(size, block.shape, block.dtype, block.device, block.module, block.phase, category)
            for size, block, category in zip(sizes, blocks, categories)
        ]

    alive = [block for block in described(at_peak) if block.bytes]
    alive.sort(key=lambda block: -block.bytes)
    by_category = dict.fromkeys(CATEGORIES, 0)
    for live in alive:
        by_category[live.category] += live.bytes
    return MemoryReport(
        peak_bytes=peak_bytes,
        peak_by_category=by_category,
        peak_index=peak_index,
        start_bytes=totals[0],
        blocks=alive,
        history=described(largest),
        timeline=timeline,
        allocator_peak_bytes=allocator_peak_bytes,
    )
