"""Whether a model keeps examples apart: looked at, not assumed.

The losses of some examples alone are differentiated. In every layer's output, the rows of the other examples must then
have no gradient. In a complete look, any two examples are on different sides at least once, each way, which takes
2 log2(B) backwards without weight gradients; a quick look takes one random half and its complement.

A layer counts as seen when the rows of every example of such a look had a gradient: zeros, as below a head that starts
at zero, say nothing. All layers that were not seen yet get a complete look. Since a model may mix examples later (in
another mode, or in batches of another order), there are quick looks at random steps, too.
"""

import random
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from memsave.ghost.refusals import refuse_mixed

COMPLETE = 8  # complete looks in a row that do not see a layer; after that it gets quick ones, until it is seen
LONGEST = 256  # backwards between two quick looks, at most


class Look:
    """What the taps of one forward saw while the losses of some examples alone were differentiated."""

    def __init__(self, kept: Tensor):
        self.kept = kept
        """(B,): the examples whose losses are differentiated now."""
        self.mixed: dict[str, Tensor] = {}
        """By layer, in the order of the backward: whether another example's row had a gradient."""
        self.reached: dict[str, Tensor] = {}
        """By layer, (B,): whose rows had a gradient from their own loss."""

    def note(self, name: str, grad: Tensor) -> None:
        """The gradient of a layer's output, (B, ...)."""
        rows = grad.reshape(len(grad), -1)
        rows = ((rows != 0) & ~rows.isnan()).any(1)  # 0 x inf is NaN: no sign of anything
        mixed, reached = (rows & ~self.kept).any(), rows & self.kept
        self.mixed[name] = self.mixed.get(name, mixed) | mixed
        self.reached[name] = self.reached.get(name, reached) | reached


class Separation:
    """Which layers were seen to keep examples apart, and when to look again."""

    def __init__(self) -> None:
        self._random = random.Random()  # its own: a look must not change the run's random numbers
        self.forget()

    def forget(self) -> None:
        """Start anew: the model is another one."""
        self.seen: set[str] = set()
        self._modes: tuple[bool, ...] | None = None
        self._unseen_looks = 0
        self._gap, self._wait = 1, 1

    def begin(self, modules: Iterable[nn.Module]) -> None:
        """Before each forward: what was seen in train mode says nothing of eval mode."""
        modes = tuple(module.training for module in modules)
        if modes != self._modes:
            self.forget()
            self._modes = modes

    def kind_of_look(self, unseen: bool) -> str:
        """What comes before this backward: a "complete" look, a "quick" one, or "" for none."""
        if unseen:
            self._unseen_looks += 1
            return "complete" if self._unseen_looks <= COMPLETE else "quick"
        self._wait -= 1
        if self._wait > 0:
            return ""
        self._gap = min(4 * self._gap, LONGEST)
        self._wait = self._random.randint(1, self._gap)
        return "quick"

    def sides(self, kind: str, size: int, device: torch.device) -> Iterator[Tensor]:
        """(B,) masks of the examples to differentiate, one for each backward of the look."""
        number = torch.arange(size, device=device)
        if kind == "complete":
            for bit in range((size - 1).bit_length()):  # any two examples differ in one
                for side in (0, 1):
                    yield (number >> bit) % 2 == side
        else:
            half = set(self._random.sample(range(size), size // 2))
            kept = torch.tensor([each in half for each in range(size)], device=device)
            yield kept
            yield ~kept

    def conclude(self, look: Look) -> None:
        """Refuse mixed examples; remember the layers that were seen."""
        refuse_mixed({name: bool(found) for name, found in look.mixed.items()})
        rows = torch.stack(list(look.reached.values())).tolist() if look.reached else []
        present = [any(row[b] for row in rows) for b in range(len(look.kept))]  # an example without targets is not
        if sum(present) < 2:
            return
        found = {name for name, row in zip(look.reached, rows, strict=True) if row == present}
        if found - self.seen:
            self._unseen_looks = 0
        self.seen |= found
