"""The contract of a layer rule, and the registry of rules by class.

A rule is called in the forward with the layer and its inputs. It returns a `RuleOutput`: the arguments to run the layer
with, the tensors to save, and a function from these and the output's gradient to the per-example gradients.

    @register_rule(MyScale)                       # y = x * w, with x (B, ..., d) and w (d,)
    def my_scale(layer: nn.Module, inputs: LayerInputs) -> RuleOutput:
        def per_example_grads(saved, grad):
            products = (saved[0] * grad).reshape(len(grad), -1, grad.shape[-1])
            return {"weight": PerSampleGrad(products.sum(1))}

        return RuleOutput(inputs.args, inputs.kwargs, (inputs.input,), per_example_grads)

A rule matches a class exactly, or by its qualified name if the class belongs to another library, because a subclass may
compute something else; the subclass that `fully_shard` puts in the place of a class is none. A rule that returns None
leaves this call to `operator_trace.py`, which follows the operators of the layer's own forward, as for any layer
without a rule.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from memsave.ghost.gradients import Gradient
from memsave.processes import class_of


@dataclass(frozen=True)
class LayerInputs:
    """One call of a layer."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch_size: int
    trainable: tuple[str, ...]
    """The names of the layer's trainable parameters."""
    name: str
    """The layer's name in the model."""
    cache: dict[Any, Any] = field(default_factory=dict)
    """What a rule has found out about the layer, kept between forwards."""

    @property
    def input(self) -> Tensor:
        """The input of a layer that takes one, by position or by name."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))


@dataclass(frozen=True)
class RuleOutput:
    """How to run the layer, and how to form its per-example gradients."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    saved: tuple[Tensor, ...]
    per_example_grads: Callable[[tuple[Tensor, ...], Tensor], dict[str, Gradient]]
    """(saved tensors, the output's gradient) to the gradients of the trainable parameters by name.

    The function lives as long as the graph. It must not hold tensors: they belong in `saved`, which checkpoints drop.
    """
    stacks: bool = False
    """Whether the function also takes several rows of each example, (B, S, ...) in place of (B, ...), for the gradient
    and all saved tensors. Otherwise it is called with (n, ...), and the n rows are summed by example."""


Rule = Callable[[nn.Module, LayerInputs], RuleOutput | None]

_BY_CLASS: dict[type[nn.Module], Rule] = {}
_BY_NAME: dict[str, Rule] = {}


def register_rule(*kinds: type[nn.Module] | str) -> Callable[[Rule], Rule]:
    """Register the decorated rule for classes, or for qualified class names (`*` matches any part of a name)."""

    def register(rule: Rule) -> Rule:
        for kind in kinds:
            if isinstance(kind, str):
                _BY_NAME[kind] = rule
            else:
                _BY_CLASS[kind] = rule
        return rule

    return register


def registered_rule(layer: nn.Module) -> Rule | None:
    """The rule registered for the layer's class, or None."""
    kind = class_of(layer)
    name = f"{kind.__module__}.{kind.__qualname__}"
    matching = (rule for pattern, rule in _BY_NAME.items() if fnmatchcase(name, pattern))
    return _BY_CLASS.get(kind) or next(matching, None)
