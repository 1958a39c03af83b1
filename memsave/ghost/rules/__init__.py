"""What each kind of layer's per-example gradients are: one file per kind, found by the layer's class.

A rule is called in the forward with the layer and its arguments, and answers with a `Use`: the arguments to run the
layer with, the tensors to save, and a function from those and the output's gradient to the per-example gradients. Rules
match a class exactly, or by its qualified name where it belongs to another library: a subclass may compute something
else (Gemma's RMSNorm scales by 1 + w), and takes the generic rule, which differentiates the layer as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from memsave.ghost.gradients import Gradient


@dataclass(frozen=True)
class Use:
    """One call of a layer."""

    args: tuple[Any, ...]
    saved: tuple[Tensor, ...]
    per_example: Callable[[tuple[Tensor, ...], Tensor], dict[str, Gradient]]
    """(saved tensors, the output's gradient) to the gradients by parameter name; more names than asked for may come."""
    kwargs: dict[str, Any] = field(default_factory=dict)


Rule = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], int], Use]
"""(layer, args, kwargs, batch size) to its use."""

_BY_CLASS: dict[type[nn.Module], Rule] = {}
_BY_NAME: dict[str, Rule] = {}


def register(*kinds: type[nn.Module] | str) -> Callable[[Rule], Rule]:
    """Decorate a rule with the classes, or their qualified names, that it is for."""

    def note(rule: Rule) -> Rule:
        for kind in kinds:
            if isinstance(kind, str):
                _BY_NAME[kind] = rule
            else:
                _BY_CLASS[kind] = rule
        return rule

    return note


def rule_for(layer: nn.Module) -> Rule:
    """The layer's own rule, or the generic one."""
    from memsave.ghost.rules import conv, embedding, linear, norm  # noqa: F401  (registered by their import)
    from memsave.ghost.rules.generic import generic

    kind = type(layer)
    return _BY_CLASS.get(kind) or _BY_NAME.get(f"{kind.__module__}.{kind.__qualname__}") or generic


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The one input of a layer, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))
