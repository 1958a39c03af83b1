"""Samplers: which examples are in the batch of a step.

    poisson             each example is in a batch with probability q, independently of the others
    truncated_poisson   the same, but of a batch larger than L a random part of L examples is taken: memory is bounded
    balls_in_bins       an epoch has T = 1/q batches; each example is in one of them, drawn anew in each epoch
    cyclic              as balls_in_bins, but drawn once: each example is in every T-th batch
    cyclic_poisson      each example is in one of b groups; batch t is a Poisson sample of group t mod b, at rate q b

The number of examples in a batch is random: whether one example is there tells nothing about another. A shuffled epoch
of batches of one size would be another mechanism, with a larger epsilon than the computed one. Which sampler has a
proven epsilon with which noise is in `mechanism.py`.
"""

import numpy as np

from memsave.privacy.mechanism import Mechanism
from memsave.privacy.randomness import SecretStream


class Sampler:
    """Draws batch after batch of indices in 0 .. size - 1.

    Args:
        mechanism: the numbers, and the name of the sampler.
        stream: random numbers with no other use.
    """

    def __init__(self, mechanism: Mechanism, stream: SecretStream):
        self.mechanism, self._stream = mechanism, stream
        self._step = 0
        self._start = stream.get_state()  # before the assignment to bins was drawn
        self._bins: np.ndarray | None = None  # (n,): the batch of an epoch, or the group, of each example

    def draw(self) -> list[int]:
        """The indices of the next batch, in their order; may be empty."""
        mechanism, step = self.mechanism, self._step
        self._step += 1
        if mechanism.bins == 1:
            return self._poisson(np.arange(mechanism.size), mechanism.sample_rate)
        if self._bins is None or (mechanism.sampler == "balls_in_bins" and step % mechanism.bins == 0):
            self._start = self._stream.get_state()
            self._bins = self._stream.integers(mechanism.size, below=mechanism.bins)
        members = np.flatnonzero(self._bins == step % mechanism.bins)
        if mechanism.sampler == "cyclic_poisson":
            return self._poisson(members, mechanism.sample_rate * mechanism.bins)
        found: list[int] = members.tolist()
        return found

    def _poisson(self, members: np.ndarray, rate: float) -> list[int]:
        # a number for every example, so that the draws of one do not depend on the group of another
        drawn = members[self._stream.uniforms(self.mechanism.size)[members] < rate]
        largest = self.mechanism.largest_batch
        if largest is not None and len(drawn) > largest:
            drawn = self._stream.choose(drawn, largest)
        found: list[int] = drawn.tolist()
        return found

    def get_state(self) -> np.ndarray:
        """uint64: the state of the stream, its state before the bins were drawn, and the number of the next batch."""
        return np.concatenate([self._stream.get_state(), self._start, [np.uint64(self._step)]])

    def set_state(self, state: np.ndarray) -> None:
        """Continue at a state of `get_state`, of a sampler with the same mechanism."""
        words = len(self._start)
        self._step, self._start = int(state[-1]), state[words : 2 * words].copy()
        self._bins = None
        if self.mechanism.bins > 1 and self._step:
            self._stream.set_state(self._start)
            self._bins = self._stream.integers(self.mechanism.size, below=self.mechanism.bins)
        self._stream.set_state(state[:words])
