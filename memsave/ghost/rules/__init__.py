"""What each kind of layer's per-example gradients are: one file per kind, found by the layer's class.

A rule is called in the forward with the layer and what it was given, and answers with a `Use`: the arguments to run the
layer with, the tensors to save, and a function from those and the output's gradient to the per-example gradients. Rules
match a class exactly, or by its qualified name where it belongs to another library: a subclass may compute something
else, and takes the generic rule, which differentiates the layer as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from memsave.ghost.gradients import Gradient


@dataclass(frozen=True)
class Given:
    """What a layer was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch_size: int
    wanted: tuple[str, ...]
    """The names of the layer's trainable parameters."""
    name: str
    """The layer's own name in the model."""
    kind: str
    """Its class, and who replaced its forward."""
    forward: Callable[..., Any]
    """The layer's function of its arguments."""
    notes: dict[Any, Any] = field(default_factory=dict)
    """What a rule has found out about the layer, kept from call to call."""

    @property
    def first(self) -> Tensor:
        """The one input of a layer, by position or by name."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))


@dataclass(frozen=True)
class Use:
    """One call of a layer."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    saved: tuple[Tensor, ...]
    per_example: Callable[[tuple[Tensor, ...], Tensor], dict[str, Gradient]]
    """(saved tensors, the output's gradient) to the gradients of the wanted parameters.

    It lives as long as the graph, so it must hold no tensor: those are in `saved`, where a checkpoint drops them.
    """
    tolerance: float | None = None
    """Given where the layer is differentiated by its own forward (see `graph.py`); `saved` then begins with all of its
    tensor arguments."""
    marks: Callable[[Tensor], tuple[Tensor, ...]] = lambda output: ()
    """Tensors made of the output, which are saved after the others."""


Rule = Callable[[nn.Module, Given], Use]

_BY_CLASS: dict[type[nn.Module], Rule] = {}
_BY_NAME: dict[str, Rule] = {}


def register(*kinds: type[nn.Module] | str) -> Callable[[Rule], Rule]:
    """Decorate a rule with the classes that it is for, or with their qualified names (`*` for any part of one)."""

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
    name = f"{kind.__module__}.{kind.__qualname__}"
    named = (rule for pattern, rule in _BY_NAME.items() if fnmatchcase(name, pattern))
    return _BY_CLASS.get(kind) or next(named, generic)
