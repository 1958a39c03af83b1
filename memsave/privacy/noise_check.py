"""A check in every step that each gradient got the noise that epsilon is computed for, and never the same noise twice.

Some elements of each gradient are read before and after the noise is added. Three faults are errors:

    no noise      elements of a parameter did not change
    other noise   the mean square of the changes is not the variance: P[X >= k + 2 sqrt(k x) + 2 x] <= e^-x and
                  P[X <= k - 2 sqrt(k x)] <= e^-x for X of chi^2 with k degrees of freedom (Laurent and Massart, 2000)
    repeated      the changes are those of an earlier step, also of a step before a checkpoint

The check reads the gradients and not the generator, so that it holds for any way of drawing noise. The changes by
correlated noise are first made independent, C y = z (see `correlated.py`). The check sees neither the elements that it
does not read, nor correlations between elements.
"""

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from memsave.privacy.correlated import inverse_series, series
from memsave.privacy.errors import PrivacyError
from memsave.processes import is_sharded, local_part, process_rank, together

READ = 64  # elements of each parameter
REMEMBERED, LEAST_REMEMBERED = 8, 4  # elements of a step's noise that are kept; with fewer, chance repeats them
SAME = 3e-4  # of a standard deviation
UNCHANGED = 8  # so many unchanged elements of a parameter, in one step or several, are no coincidence
EXPONENT = 32.0  # x above: a false alarm in 10^14 tests
ROUNDING = 64.0  # noise is compared only where its standard deviation is so many units of the last digit


class NoiseCheck:
    """Reads gradients before and after noise; raises PrivacyError for noise that is missing, wrong or repeated.

    Args:
        parameters: those of `GaussianNoise`.
        names: their names, for error messages.
        noise, bands: those of `GaussianNoise`.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        names: Sequence[str],
        *,
        noise: str = "independent",
        bands: int = 1,
    ):
        self._parameters, self._names = list(parameters), list(names)
        self._is_banded = noise == "banded"
        weights = (
            series(noise, bands=bands, steps=bands)
            if self._is_banded
            else -inverse_series(noise, bands=bands, steps=bands)
        )
        self._weights = weights[1:].tolist()  # z_t = y_t + c_1 y_(t-1) + ..., or y_t - d_1 z_(t-1) - ...
        self._before: Tensor | None = None
        self._positions: list[Tensor] | None = None
        self.reset()

    def reset(self, remembered: Tensor | None = None, past: Tensor | None = None) -> None:
        """Forget all steps, or all but those of a checkpoint: the results of `remembered` and `past` there."""
        self._past: deque[Tensor] = deque(() if past is None else past, maxlen=len(self._weights))
        self._squares = torch.zeros(len(self._parameters), dtype=torch.float64, device="cpu")
        self._counts = torch.zeros(len(self._parameters), dtype=torch.float64, device="cpu")
        self._unchanged = torch.zeros(len(self._parameters), dtype=torch.float64, device="cpu")
        self._steps = 0 if remembered is None else len(remembered)
        self._noise = torch.full((max(256, 2 * self._steps), REMEMBERED), math.nan, dtype=torch.float64, device="cpu")
        if remembered is not None:
            self._noise[: self._steps] = remembered

    @property
    def remembered(self) -> Tensor:
        """(steps, 8): elements of each step's noise, for a checkpoint. As secret as the noise."""
        return self._noise[: self._steps].clone()

    @property
    def past(self) -> Tensor:
        """(k, elements): what correlated noise is made independent with, newest first, for a checkpoint. Secret."""
        return torch.stack(list(self._past)) if self._past else torch.zeros(0, dtype=torch.float64, device="cpu")

    def before(self) -> None:
        """Read the gradients before the noise."""
        self._before = self._read()

    def after(self, std: float) -> None:
        """Compare the gradients with those before the noise, whose standard deviation is `std`; 0 checks nothing.

        All processes must call it together.
        """
        with together():
            if self._before is None or not std:
                return
            numbers = torch.finfo(self._parameters[0].dtype)
            changes, resolution = self._read() - self._before, self._before.abs().clamp(min=numbers.tiny) * numbers.eps
            usable = std > ROUNDING * resolution
            self._before = None
            self._check_presence(changes, usable)
            changes = self._independent(changes)
            self._check_size(changes / std, usable)
            self._check_repetition(torch.where(std * SAME > resolution, changes, math.nan), std)

    def _independent(self, changes: Tensor) -> Tensor:
        """The new part z of each change y."""
        found = changes.clone()
        for weight, past in zip(self._weights, self._past):
            found += weight * past
        if self._weights:
            self._past.appendleft(changes if self._is_banded else found)
        return found

    @property
    def _own(self) -> list[int]:
        """The parameters to which this process adds noise."""
        return [n for n, p in enumerate(self._parameters) if process_rank() == 0 or is_sharded(p)]

    def _read(self) -> Tensor:
        """Elements of all gradients, in float64 on the CPU."""
        local = []
        for number in self._own:
            gradient = self._parameters[number].grad
            assert gradient is not None
            local.append(local_part(gradient))
        if self._positions is None or [len(each) for each in self._positions] != [min(READ, g.numel()) for g in local]:
            self._positions = [
                torch.linspace(0, each.numel() - 1, READ, dtype=torch.float64, device=each.device).long()
                if each.numel() > READ
                else torch.arange(each.numel(), device=each.device)
                for each in local
            ]
            lengths = torch.tensor([len(each) for each in self._positions], dtype=torch.long, device="cpu")
            self._groups = torch.tensor(self._own, dtype=torch.long, device="cpu").repeat_interleave(lengths)
        if not local:
            return torch.empty(0, dtype=torch.float64, device="cpu")
        parts = [gradient.take(place) for gradient, place in zip(local, self._positions, strict=True)]
        return torch.cat([part.double() for part in parts]).cpu()

    def _sum(self, values: Tensor) -> Tensor:
        """The sum of the values of each parameter."""
        return torch.zeros(len(self._parameters), dtype=torch.float64, device="cpu").index_add_(
            0, self._groups, values.double()
        )

    def _check_presence(self, changes: Tensor, usable: Tensor) -> None:
        changed = self._sum((changes != 0) & usable) > 0
        self._unchanged = torch.where(changed, 0, self._unchanged + self._sum((changes == 0) & usable))
        bare = (self._unchanged >= UNCHANGED).nonzero().flatten().tolist()
        if bare:
            raise PrivacyError(
                f"{self._listed(bare)} got no noise, so the sum of gradients is not private: do not release anything "
                f"of this run"
            )

    def _check_size(self, scaled: Tensor, usable: Tensor) -> None:
        self._counts += self._sum(usable)
        self._squares += self._sum(torch.where(usable, scaled, 0).square())
        for counts, squares, names in (
            (self._counts, self._squares, None),
            (self._counts.sum()[None], self._squares.sum()[None], "the gradients"),
        ):
            spread = 2 * (counts * EXPONENT).sqrt()
            wrong = ((squares < counts - spread) | (squares > counts + spread + 2 * EXPONENT)) & (counts > 0)
            found = wrong.nonzero().flatten().tolist()
            if found:
                ratio = (squares[found[0]] / counts[found[0]]).sqrt().item()
                raise PrivacyError(
                    f"the noise of {names or self._listed(found)} has {ratio:.3g} times the standard deviation that "
                    f"epsilon is computed for: do not release anything of this run"
                )

    def _check_repetition(self, changes: Tensor, std: float) -> None:
        if len(changes) < LEAST_REMEMBERED:
            return
        places = torch.linspace(
            0, len(changes) - 1, min(REMEMBERED, len(changes)), dtype=torch.float64, device="cpu"
        ).long()
        row = torch.full((REMEMBERED,), math.nan, dtype=torch.float64, device="cpu")
        row[: len(places)] = changes[places]
        compared = ~row.isnan()
        if compared.sum() >= LEAST_REMEMBERED:
            same = ((self._noise[: self._steps, compared] - row[compared]).abs() <= SAME * std).all(1)
            if same.any():
                raise PrivacyError(
                    f"the noise of this step is that of step {int(same.nonzero()[0]) + 1}, and the difference of the "
                    f"two steps is not private: do not release anything of this run"
                )
        if self._steps == len(self._noise):
            self._noise = torch.cat([self._noise, torch.full_like(self._noise, math.nan)])
        self._noise[self._steps] = row
        self._steps += 1

    def _listed(self, numbers: Sequence[int]) -> str:
        names = [self._names[number] for number in numbers[:3]]
        return ", ".join(names) + (f" and {len(numbers) - 3} more" if len(numbers) > 3 else "")
