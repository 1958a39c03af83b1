"""Per-example gradient clipping without per-example gradients."""

from memsave.ghost.clipper import GhostClipper
from memsave.ghost.coverage import coverage
from memsave.ghost.coverage_report import Coverage, ParameterCoverage
from memsave.ghost.example_rows import example_rows
from memsave.ghost.gradients import FactoredGrad, PerSampleGrad
from memsave.ghost.head import linear_cross_entropy
from memsave.ghost.rule import LayerInputs, RuleOutput, register_rule
from memsave.ghost.verify import ClippingReport, verify

__all__ = [
    "ClippingReport",
    "Coverage",
    "FactoredGrad",
    "GhostClipper",
    "LayerInputs",
    "ParameterCoverage",
    "PerSampleGrad",
    "RuleOutput",
    "coverage",
    "example_rows",
    "linear_cross_entropy",
    "register_rule",
    "verify",
]
