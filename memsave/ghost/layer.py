"""A module of the model as the clipper sees it: its forward, with a tap at the end."""

from typing import Any

import torch
from torch import Tensor, nn

from memsave.ghost.gradients import Gradient, Outer
from memsave.ghost.rules import Given, rule_for
from memsave.ghost.rules.generic import generic, replaced
from memsave.ghost.tap import Call, Tap, Tapped


class Layer:
    """A module whose forward ends in a tap."""

    def __init__(self, clipper: Any, module: nn.Module, *, name: str, names: tuple[str, ...]):
        self.clipper, self.module, self.name, self.names = clipper, module, name, names
        self.folded = False
        self.notes: dict[Any, Any] = {}
        self.rule = generic if any("." in each for each in names) else rule_for(module)
        module.forward = self.forward

    def detach(self) -> None:
        """Give the module its own forward back."""
        del self.module.__dict__["forward"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's function; under grad, with the tap at its end."""
        call = self.clipper.call_of(self.name)
        original = type(self.module).forward
        if call is None:
            return original(self.module, *args, **kwargs)
        use = self.rule(self.module, Given(args, kwargs, call.batch_size, self.names, self.notes))
        parameters = [self.module.get_parameter(name) for name in self.names]
        note_uses(call, self.name, parameters)
        with replaced(self.module, {name: p.detach() for name, p in zip(self.names, parameters, strict=True)}):
            output = original(self.module, *use.args, **use.kwargs)
        saved, folded = use.saved, None
        if self.folded and self.rule is not generic and isinstance(output, Tensor) and len(output) != call.batch_size:
            folded = (call.batch_size, len(output) // call.batch_size)
            output, saved = output.unflatten(0, folded), tuple(each.unflatten(0, folded) for each in saved)
        if not isinstance(output, Tensor) or not output.dim() or len(output) != call.batch_size:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"{self.name} ({type(self.module).__name__}) gave {shape} for a batch of {call.batch_size}; a "
                f"trainable layer must keep the batch in dimension 0: freeze it, or wrap it in a module that does"
            )
        tapped = Tap.apply(
            output, call.probe, Tapped(self.name, self.names, use.per_example), call, len(saved), *saved, *parameters
        )
        return tapped if folded is None else tapped.flatten(0, 1)


class RelativeBias:
    """T5's relative attention bias, a table without a batch axis: expanded to the batch where it is produced.

    The table's rows depend on positions alone, so its look-up is the same for every example; its gradient is not.
    """

    names = ("weight",)

    def __init__(self, clipper: Any, attention: Any, *, name: str):
        self.clipper, self.attention, self.name = clipper, attention, name
        self.module = attention.relative_attention_bias
        attention.compute_bias = self.compute_bias

    @staticmethod
    def applies(module: nn.Module) -> bool:
        """Whether the module produces such a bias from a trainable table."""
        table = getattr(module, "relative_attention_bias", None)
        return hasattr(module, "compute_bias") and isinstance(table, nn.Embedding) and table.weight.requires_grad

    def detach(self) -> None:
        """Give the attention its own method back."""
        del self.attention.__dict__["compute_bias"]

    def compute_bias(self, *args: Any, **kwargs: Any) -> Tensor:
        """The bias, (B, heads, queries, keys) in the place of (1, heads, queries, keys)."""
        original, call = type(self.attention).compute_bias, self.clipper.call_of(self.name)
        if call is None:
            return original(self.attention, *args, **kwargs)
        weight, looked_up = self.module.weight, []
        handle = self.module.register_forward_pre_hook(lambda module, given: looked_up.append(given[0]))
        with handle, replaced(self.module, {"weight": weight.detach()}):
            bias = original(self.attention, *args, **kwargs)
        (rows,) = looked_up  # (queries, keys)
        note_uses(call, self.name, [weight])

        def per_example(saved: tuple[Tensor, ...], grad: Tensor) -> dict[str, Gradient]:
            left = saved[0].flatten().expand(len(grad), -1)  # (B, queries keys)
            return {"weight": Outer(left, grad.permute(0, 2, 3, 1).flatten(1, 2), rows=self.module.num_embeddings)}

        tapped = Tapped(self.name, self.names, per_example)
        return Tap.apply(bias.expand(call.batch_size, *bias.shape[1:]), call.probe, tapped, call, 1, rows, weight)


def note_uses(call: Call, name: str, parameters: list[nn.Parameter]) -> None:
    """Count a use of each parameter, unless the forward is a recomputation of one that was counted."""
    if in_backward():
        return
    call.layers.add(name)
    for parameter in parameters:
        call.count(parameter)
    call.rematerialised |= _redirected()


def in_backward() -> bool:
    """Whether autograd is running: a forward is then a recomputation."""
    return torch._C._current_graph_task_id() != -1


def _redirected() -> bool:
    """Whether saved tensors are redirected: by a checkpoint, a reversible sequence, offloading."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
