"""Rules for operators that get a trainable parameter together with a tensor of the examples."""

from memsave.ghost.operators import broadcasting, convolutions, lookups, products, recurrent, rewritten
from memsave.ghost.operators.general import example_by_example
from memsave.ghost.operators.rule import Operator, OperatorRule, operator_rule, registered_operator

__all__ = [
    "Operator",
    "broadcasting",
    "convolutions",
    "example_by_example",
    "lookups",
    "operator_rule",
    "products",
    "recurrent",
    "rewritten",
    "rule_of",
]


def rule_of(name: str) -> OperatorRule:
    """The operator's rule; example by example if it has none."""
    return registered_operator(name) or example_by_example
