"""The result of a recording: the peak, its contents, and the timeline.

The report is computed from the ledger's events: memory in state k is memory in state 0 plus the first k changes. Each
change belongs to one category, so the categories add up to the total in every state, and the timeline needs only a few
small numbers per event. Sizes are integer bytes; KiB, MiB and GiB appear only in printed text.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from memsave.profiler.ledger import Block
from memsave.profiler.plot import plot_reports
from memsave.profiler.sizes import format_bytes
from memsave.profiler.timeline import CATEGORIES, LiveBlock, Timeline


@dataclass(frozen=True)
class MemoryReport:
    """The memory of one recording; `print` it, plot it, or write it as JSON."""

    peak_bytes: int
    """The largest number of live bytes in any state, including the bytes that existed before the recording."""
    peak_by_category: dict[str, int]
    """Adds up to `peak_bytes` exactly."""
    peak_index: int
    """The first state with `peak_bytes`."""
    start_bytes: int
    """The bytes of state 0: parameters, inputs and everything else that existed before."""
    blocks: list[LiveBlock]
    """The blocks alive at the peak, largest first."""
    history: list[LiveBlock]
    """All blocks of the recording, in the order in which they were first seen."""
    timeline: Timeline
    allocator_peak_bytes: int | None = None
    """The result of `allocator_peak`: bytes above the start, workspaces included, so not comparable with the others."""
    offloaded_bytes: int = 0
    """The most bytes in host memory at one time, beside `peak_bytes`: what `memsave.offload` has moved there during the
    recording, and the optimizer's state that was there before."""

    def as_dict(self) -> dict[str, Any]:
        """The report in JSON types."""
        lists = {key: [dict(vars(block)) for block in getattr(self, key)] for key in ("blocks", "history")}
        return {**vars(self), **lists, "timeline": dict(vars(self.timeline))}  # asdict would copy every number

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "MemoryReport":
        """The inverse of `as_dict`, also after JSON has turned tuples into lists."""
        timeline = dict(data["timeline"])
        for key in ("phases", "alive"):
            timeline[key] = [tuple(pair) for pair in timeline[key]]
        lists = {
            key: [LiveBlock(**{**block, "shape": tuple(block["shape"])}) for block in data[key]]
            for key in ("blocks", "history")
        }
        return cls(**{**data, "timeline": Timeline(**timeline), **lists})

    def to_json(self, path: str | PathLike[str]) -> None:
        """Write the report to a JSON file."""
        Path(path).write_text(json.dumps(self.as_dict(), separators=(",", ":")) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | PathLike[str]) -> "MemoryReport":
        """Read a report that `to_json` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def plot(
        self,
        path: str | PathLike[str],
        *,
        title: str | None = None,
        name: str = "",
        others: "Mapping[str, MemoryReport] | None" = None,
    ) -> None:
        """Draw the report, with others beside it on the same memory axis; see `plot_reports`."""
        plot_reports({name: self, **(others or {})}, path, title=title)

    @property
    def largest_block_bytes(self) -> int:
        """The size of the largest activation or temporary of the recording."""
        own = (block.bytes for block in self.history if block.category in ("activation", "temporary"))
        return max(own, default=0)

    def growth(self, since: "MemoryReport | None" = None) -> tuple[str, str | None, int]:
        """(category, module, bytes) of the largest increase at the peak, compared with the report `since`.

        The category with the largest increase, and the module with the largest increase in this category. Without
        `since`, the largest category and module.
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
        if self.offloaded_bytes:
            lines.append(f"in host memory  {format_bytes(self.offloaded_bytes)}")
        for name, size in sorted(self.peak_by_category.items(), key=lambda item: -item[1]):
            if size:
                lines.append(f"  {name:<12}{format_bytes(size):>12}{size / self.peak_bytes:>8.1%}")
        lines.append("largest blocks at the peak")
        for block in self.blocks[:5]:
            shape = "x".join(map(str, block.shape)) or "scalar"
            owner = "outside" if block.module is None else block.module or "model"
            lines.append(
                f"  {format_bytes(block.bytes):>12}  {block.category:<11} {block.dtype} {shape}  {owner}, {block.phase}"
            )
        return "\n".join(lines)


def build_report(
    blocks: list[Block],
    *,
    events: list[tuple[int, int]],
    categories: list[str],
    phases: list[tuple[int, str]],
    offloaded_bytes: int = 0,
    allocator_peak_bytes: int | None = None,
) -> MemoryReport:
    """Compute the report from the events of a ledger and the categories of its blocks."""
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

    def live_blocks(sizes: list[int]) -> list[LiveBlock]:
        return [
            LiveBlock(size, block.shape, block.dtype, block.device, block.module, block.phase, category)
            for size, block, category in zip(sizes, blocks, categories)
        ]

    alive = [block for block in live_blocks(at_peak) if block.bytes]
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
        history=live_blocks(largest),
        timeline=timeline,
        offloaded_bytes=offloaded_bytes,
        allocator_peak_bytes=allocator_peak_bytes,
    )
