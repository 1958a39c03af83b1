"""Backend 1: sequences of blocks that rebuild their activations instead of storing them."""

from memsave.reversible.coupling import AdditiveCoupling, AffineCoupling, Coupling, Stream
from memsave.reversible.fused import RecomputableBranch
from memsave.reversible.residual import ReversibleResidual, from_residual
from memsave.reversible.sequence import InvertibleBlock, ReversibleSequence
from memsave.reversible.verify import Verification, verify

__all__ = [
    "AdditiveCoupling",
    "AffineCoupling",
    "Coupling",
    "InvertibleBlock",
    "RecomputableBranch",
    "ReversibleResidual",
    "ReversibleSequence",
    "Stream",
    "Verification",
    "from_residual",
    "verify",
]
