"""The registry of rules for operators that get a trainable parameter together with a tensor of the examples.

A rule is called with the `OperatorTrace` and the operator's call, in place of the operator. It returns the operator's
output, with a norm hook for each parameter, or raises `LayerRefused`. Two devices are enough for most operators:

- `trace.copies(source, shape, rows)` broadcasts what the parameters are computed into over the rows of the output. An
  elementwise operator with the copies instead of the parameter gives, as the gradient of the copies, each row's share.
- `trace.hook(output, source, rows, saved, gradient)` ends the operator in a norm hook, where the gradient follows from
  saved tensors at less cost: products, convolutions, look-ups.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from memsave.ghost.operator_trace import OperatorTrace


@dataclass(frozen=True, eq=False)
class Operator:
    """One call of an operator."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> Iterator[Tensor]:
        """The tensors among the arguments."""
        return tensors_among((*self.args, *self.kwargs.values()))

    def argument(self, position: int, *names: str, default: Any = None) -> Any:
        """An argument by position or by one of its names."""
        if len(self.args) > position:
            return self.args[position]
        return next((self.kwargs[name] for name in names if name in self.kwargs), default)

    def run(self, replace: Callable[[Tensor], Tensor]) -> Any:
        """Run the operator with other tensors in place of its tensor arguments."""
        args, kwargs = _replaced((self.args, self.kwargs), replace)
        return self.function(*args, **kwargs)


OperatorRule = Callable[["OperatorTrace", Operator], Any]
_RULES: dict[str, OperatorRule] = {}


def operator_rule(names: str) -> Callable[[OperatorRule], OperatorRule]:
    """Register the decorated rule for operators by their names."""

    def register(rule: OperatorRule) -> OperatorRule:
        for name in names.split():
            _RULES[name] = rule
        return rule

    return register


def registered_operator(name: str) -> OperatorRule | None:
    """The rule registered for an operator, or None."""
    return _RULES.get(name)


def tensors_among(values: Any) -> Iterator[Tensor]:
    """The tensors among the values, also inside tuples and lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_among(value)


def _replaced(value: Any, replace: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return replace(value)
    if isinstance(value, (tuple, list)):
        items = [_replaced(each, replace) for each in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {key: _replaced(each, replace) for key, each in value.items()}
    return value
