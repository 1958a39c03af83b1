"""`Mechanism`: clipping, sampler, noise and accountant as one object, which knows its epsilon.

    noise         sampler                      accountant          epsilon of t steps is that of
    independent   poisson                      pld, prv, rdp       t subsampled Gaussian mechanisms
                  truncated_poisson            pld                 the same, with truncation (arXiv 2508.15089)
                  balls_in_bins                pld                 t / T epochs (Chua et al., 2024; see allocation.py)
                  cyclic                       pld, prv, rdp       t / T Gaussian mechanisms, without amplification
    banded        cyclic                       pld, prv, rdp       one Gaussian mechanism (see correlated.py)
                  cyclic_poisson               pld, prv, rdp       t / b subsampled ones (Choquette-Choo et al., 2023)
    regenerated   cyclic                       pld, prv, rdp       one Gaussian mechanism

Other combinations are refused: nobody has proven their epsilon, or memsave does not compute it.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from memsave.privacy.accountants import check_accountant
from memsave.privacy.accounting import calibrated, check_delta, default_delta, epsilon_curve, epsilon_of_events
from memsave.privacy.correlated import error_of_sums, sensitivity, series
from memsave.privacy.errors import PrivacyError
from memsave.privacy.events import Event, check_noise

SAMPLERS_OF = {
    "independent": ("poisson", "truncated_poisson", "balls_in_bins", "cyclic"),
    "banded": ("cyclic", "cyclic_poisson"),
    "regenerated": ("cyclic",),
}
ONLY_PLD = ("truncated_poisson", "balls_in_bins")


@dataclass(frozen=True)
class Mechanism:
    """The parameters that determine epsilon; a resumed run must have the same."""

    size: int
    """n, the number of examples."""
    batch_size: int
    """q n, the expected size of a batch. Samplers with bins take the next smaller one, n / bins."""
    noise_multiplier: float
    """sigma."""
    max_grad_norm: float
    """C."""
    delta: float
    accountant: str = "pld"
    """pld | prv | rdp."""
    sampler: str = "poisson"
    """poisson | truncated_poisson | balls_in_bins | cyclic | cyclic_poisson; see `sampling.py`."""
    largest_batch: int | None = None
    """L, the largest size of a batch of truncated_poisson."""
    noise: str = "independent"
    """independent | banded | regenerated; see `correlated.py`."""
    bands: int = 1
    """b, the number of bands of correlated noise; 1 for independent noise."""

    def __post_init__(self) -> None:
        check_accountant(self.accountant)
        check_noise(self.noise_multiplier)
        if not 0 < self.max_grad_norm < math.inf:
            raise PrivacyError(f"max_grad_norm is {self.max_grad_norm:g}; give a finite number above 0, such as 1.0")
        if not 0 < self.batch_size <= self.size:
            raise PrivacyError(
                f"the batch size is {self.batch_size} for {self.size} examples; give one from 1 to {self.size}"
            )
        check_delta(self.delta, size=self.size)
        self._check_combination()

    @classmethod
    def of_options(cls, options: Any, *, size: int, batch_size: int) -> "Mechanism":
        """The mechanism of options by the names of `privacy=ghost`, with a noise multiplier of 1 if they give none.

        `target_delta=None` stands for `default_delta(size)`.
        """
        return cls(
            size,
            batch_size,
            1.0 if options.noise_multiplier is None else options.noise_multiplier,
            options.max_grad_norm,
            delta=default_delta(size) if options.target_delta is None else options.target_delta,
            accountant=options.accountant,
            sampler=options.sampler,
            largest_batch=options.largest_batch,
            noise=options.noise,
            bands=1 if options.noise == "independent" else options.bands,
        )

    def _check_combination(self) -> None:
        if self.noise not in SAMPLERS_OF:
            raise PrivacyError(f"noise is {self.noise!r}; choose one of {', '.join(SAMPLERS_OF)}")
        samplers = SAMPLERS_OF[self.noise]
        if self.sampler not in samplers:
            raise PrivacyError(
                f"no epsilon is known for noise={self.noise} with sampler={self.sampler}; give "
                f"sampler={' or '.join(samplers)}"
            )
        if self.sampler in ONLY_PLD and self.accountant != "pld":
            raise PrivacyError(
                f"accountant={self.accountant} has no bound for sampler={self.sampler}; give accountant=pld"
            )
        if (self.sampler == "truncated_poisson") != (self.largest_batch is not None):
            raise PrivacyError("give largest_batch with sampler=truncated_poisson, and with no other sampler")
        if self.largest_batch is not None and not self.batch_size <= self.largest_batch <= self.size:
            raise PrivacyError(
                f"largest_batch is {self.largest_batch}; give at least the batch size, {self.batch_size}, and at most "
                f"the {self.size} examples"
            )
        if self.bands < 1 or (self.bands > 1) != (self.noise != "independent"):
            raise PrivacyError(
                f"bands is {self.bands} with noise={self.noise}; give 1 for independent noise, and 2 or more otherwise"
            )
        if self.sampler == "cyclic_poisson" and self.batch_size * self.bands > self.size:
            raise PrivacyError(
                f"batches of {self.batch_size} cannot be drawn from {self.bands} groups (bands) of {self.size} "
                f"examples; give fewer bands, or a smaller batch"
            )

    @property
    def bins(self) -> int:
        """T: every T-th batch holds the same examples (cyclic), or may (balls_in_bins, cyclic_poisson); else 1."""
        if self.sampler == "cyclic_poisson":
            return self.bands
        return math.ceil(self.size / self.batch_size) if self.sampler in ("balls_in_bins", "cyclic") else 1

    @property
    def sample_rate(self) -> float:
        """q: the share of the examples that a batch is expected to hold."""
        return 1 / self.bins if self.sampler in ("balls_in_bins", "cyclic") else self.batch_size / self.size

    def events(self, steps: int) -> list[Event]:
        """What `steps` steps do to the data, for the accountants."""
        sigma, epochs = self.noise_multiplier, math.ceil(steps / self.bins)
        if self.noise != "independent" and self.sampler == "cyclic" and steps:
            largest = sensitivity(self.noise, bands=self.bands, steps=steps, period=self.bins)
            return [Event(sigma / largest, 1.0, 1)]
        if self.sampler == "cyclic_poisson":
            column = float(sum(series(self.noise, bands=self.bands, steps=self.bands) ** 2)) ** 0.5
            return [Event(sigma / column, self.sample_rate * self.bins, epochs)]
        if self.sampler == "cyclic":
            return [Event(sigma, 1.0, epochs)]
        if self.sampler == "balls_in_bins":
            return [Event(sigma, self.sample_rate, epochs, bins=self.bins)]
        truncated = {} if self.largest_batch is None else {"largest_batch": self.largest_batch, "size": self.size}
        return [Event(sigma, self.sample_rate, steps, **truncated)]

    def epsilon(self, steps: int) -> float:
        """An upper bound of the epsilon that `steps` steps spend."""
        return epsilon_of_events(self.events(steps), delta=self.delta, accountant=self.accountant)

    def curve(self, steps: int, deltas: list[float]) -> list[float]:
        """Upper bounds of epsilon, one for each delta."""
        if self.accountant == "pld":
            return epsilon_curve(self.events(steps), deltas)
        return [epsilon_of_events(self.events(steps), delta=each, accountant=self.accountant) for each in deltas]

    def calibrated(self, target_epsilon: float, *, steps: int) -> "Mechanism":
        """This mechanism with the smallest noise for which `steps` steps spend at most the target."""

        def epsilon(noise_multiplier: float) -> float:
            return replace(self, noise_multiplier=noise_multiplier).epsilon(steps)

        what = f"{steps} steps at sample rate {self.sample_rate:g}"
        return replace(self, noise_multiplier=calibrated(epsilon, target_epsilon=target_epsilon, what=what))

    def error_of_sums(self, steps: int) -> float:
        """The standard deviation of the noise in a sum of steps, per coordinate, in units of C.

        Root mean square over the sums of the first 1, 2, ..., `steps` steps: how far noise moves the weights of SGD.
        """
        return self.noise_multiplier * error_of_sums(self.noise, bands=self.bands, steps=steps)
