"""Reversible sequences: blocks whose activations are rebuilt in backward instead of stored."""

from memsave.reversible.convert import Conversion, make_reversible
from memsave.reversible.coupling import AdditiveCoupling, AffineCoupling, Coupling, Stream
from memsave.reversible.fused import RecomputableBranch
from memsave.reversible.residual import ReversibleResidual, from_residual
from memsave.reversible.sequence import InvertibleBlock, ReversibleSequence
from memsave.reversible.verify import InversionReport, verify

__all__ = [
    "AdditiveCoupling",
    "AffineCoupling",
    "Conversion",
    "Coupling",
    "InversionReport",
    "InvertibleBlock",
    "RecomputableBranch",
    "ReversibleResidual",
    "ReversibleSequence",
    "Stream",
    "from_residual",
    "make_reversible",
    "verify",
]
