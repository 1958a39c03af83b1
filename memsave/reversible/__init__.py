"""Backend 1: sequences of blocks that rebuild their activations instead of storing them."""

from memsave.reversible.coupling import AdditiveCoupling, Stream
from memsave.reversible.sequence import ReversibleSequence

__all__ = ["AdditiveCoupling", "ReversibleSequence", "Stream"]
