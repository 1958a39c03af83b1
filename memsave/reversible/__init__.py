"""Reversible sequences: blocks whose activations are rebuilt in backward instead of stored."""

from memsave.reversible.coupling import AdditiveCoupling, AffineCoupling, Coupling, Stream
from memsave.reversible.fused import RecomputableBranch
from memsave.reversible.residual import ReversibleResidual, from_residual
from memsave.reversible.sequence import InvertibleBlock, ReversibleSequence
from memsave.reversible.verify import InversionReport, verify

__all__ = [
    "AdditiveCoupling",
    "AffineCoupling",
    "Coupling",
    "InversionReport",
    "InvertibleBlock",
    "RecomputableBranch",
    "ReversibleResidual",
    "ReversibleSequence",
    "Stream",
    "from_residual",
    "verify",
]
