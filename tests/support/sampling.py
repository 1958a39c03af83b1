"""The batches that a run with a known seed draws."""

from collections.abc import Iterator

from memsave.privacy import Mechanism
from memsave.privacy.randomness import SecretStream
from memsave.privacy.sampling import Sampler


def poisson_batches(*, size: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """The Poisson batches of `PrivateGradients` with this seed."""
    sampler = Sampler(Mechanism(size, batch_size, 1.0, 1.0, delta=0.5 / size), SecretStream(2 * seed))
    while True:
        yield sampler.draw()
