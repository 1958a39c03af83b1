"""The blocks of a recording, and the live bytes of each category over time."""

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate

CATEGORIES = ("parameter", "gathered", "buffer", "optimizer", "gradient", "input", "activation", "temporary")


@dataclass(frozen=True)
class LiveBlock:
    """One storage of a recording."""

    bytes: int
    """Its size at the peak; in `MemoryReport.history`, its largest size."""
    shape: tuple[int, ...]
    dtype: str
    device: str
    module: str | None
    """The module that created it in forward or backward, or owns it; "" is the model, None is outside all modules."""
    phase: str
    """forward, recompute, backward or optimizer; `before` if it existed before the recording."""
    category: str


@dataclass(frozen=True)
class Timeline:
    """Live bytes by category in every state; there is one state more than events."""

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
    """(block, bytes) of the blocks alive in state 0."""

    def __len__(self) -> int:
        return len(self.deltas) + 1

    def totals(self) -> list[int]:
        """Live bytes in every state."""
        return list(accumulate(self.deltas, initial=sum(self.start.values())))

    def between(self, first: int, last: int) -> "Timeline":
        """The part of the timeline from state `first` to state `last`."""
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
