"""Layer rules: one file for each kind of layer, found by the layer's class."""

from torch import nn

from memsave.ghost.rule import Rule, registered_rule
from memsave.ghost.rules import conv, embedding, linear, norm  # importing a rule registers it
from memsave.ghost.rules.generic import generic

__all__ = ["conv", "embedding", "generic", "linear", "norm", "rule_for"]


def rule_for(layer: nn.Module) -> Rule:
    """The rule registered for the layer's class, or the generic one."""
    return registered_rule(layer) or generic
