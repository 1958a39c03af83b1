"""A module of the model as the clipper sees it: its forward, with a tap at the end."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from memsave.ghost.gradients import Gradient, Outer
from memsave.ghost.graph import Traced
from memsave.ghost.refusals import Refusal, Refused, described
from memsave.ghost.rules import Given, Use, rule_for
from memsave.ghost.rules.generic import generic, inside_a_layer, replaced
from memsave.ghost.tap import Call, Tap, Tapped, graph_task

KEEP_THE_BATCH = (
    "keep the batch in dimension 0 of its output (expand to the batch what is the same for all examples), or freeze it"
)
ONE_TENSOR = (
    "let its forward return one tensor with the batch in dimension 0, as a subclass can (for an LSTM with "
    "batch_first=True: return super().forward(x)[0]), or freeze it"
)


class Layer:
    """A module whose forward ends in a tap.

    Which of its parameters are trainable is read at each forward.
    """

    def __init__(self, clipper: Any, module: nn.Module, *, name: str, names: tuple[str, ...]):
        self.clipper, self.module, self.name, self.names = clipper, module, name, names
        self.folded = self._detached = False
        self.notes: dict[Any, Any] = {}
        self._before: Any = vars(module).get("forward")
        """The forward that the instance had of its own, for instance accelerate's."""
        self.original = self._before or partial(type(module).forward, module)
        plain = self._before is None and set(names) <= {"weight", "bias"}  # what rules know
        plain = plain and not any(p.is_complex() for p in module.parameters())
        self.rule = rule_for(module) if plain else generic
        kind = type(module).__name__
        self.kind = kind if plain or self._before is None else f"{kind} with the forward {described(self._before)}"
        module.forward = self.forward

    def detach(self) -> None:
        """Give the module its own forward back; where somebody replaced ours, it does nothing from now on."""
        self._detached = True
        if getattr(vars(self.module).get("forward"), "__self__", None) is self:
            del self.module.__dict__["forward"]
            if self._before is not None:
                self.module.forward = self._before

    def __deepcopy__(self, memo: dict[int, Any]) -> "Layer":
        """For a copy of the model, which has no clipper: it does nothing."""
        copy = memo[id(self)] = object.__new__(Layer)
        copy._detached = True
        copy.module = deepcopy(self.module, memo)
        before = self._before and deepcopy(self._before, memo)
        copy.original = before or partial(type(copy.module).forward, copy.module)
        return copy

    @property
    def detached(self) -> bool:
        """Whether it does nothing any more."""
        return self._detached

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's function; under grad, with the tap at its end."""
        if self._detached or inside_a_layer():  # of which this one is a part
            return self.original(*args, **kwargs)
        trainable = {name: p for name in self.names if (p := _parameter(self.module, name)).requires_grad}
        call = self.clipper.call_of(self.name) if trainable else None
        if call is None or not call.batch_size:
            return self.original(*args, **kwargs)
        foreign = [name for name, p in trainable.items() if not self.clipper.holds(p)]
        if foreign:
            self._refuse(
                call,
                f"has another tensor in the place of its {foreign[0]} (torch.func.functional_call does that)",
                "call the model with its own parameters",
            )
            return self.original(*args, **kwargs)
        try:
            given = Given(
                args, kwargs, call.batch_size, tuple(trainable), self.name, self.kind, self.original, self.notes
            )
            use = self.rule(self.module, given)
        except Refused as refused:
            self._refuse(call, refused.reason, refused.remedy)
            return self.original(*args, **kwargs)
        note_uses(call, self.name, list(trainable.values()))
        traced = None if use.tolerance is None else Traced(self.name, use.tolerance)
        if traced is None:
            stand_ins = {name: p.detach() for name, p in trainable.items()}
        else:
            stand_ins = {name: traced.stand_in(name, p) for name, p in trainable.items()}
            if not in_backward():
                call.traced.append(traced)
        with replaced(self.module, stand_ins):
            output = self.original(*use.args, **use.kwargs)
        return self._tapped(call, use, output, trainable, traced)

    def _tapped(
        self, call: Call, use: Use, output: Any, trainable: dict[str, nn.Parameter], traced: Traced | None
    ) -> Any:
        saved, folded = use.saved, None
        if self.folded and traced is None and isinstance(output, Tensor) and len(output) != call.batch_size:
            folded = (call.batch_size, len(output) // call.batch_size)
            output, saved = output.unflatten(0, folded), tuple(each.unflatten(0, folded) for each in saved)
        if not isinstance(output, Tensor) or not output.dim() or len(output) != call.batch_size:
            tensor = isinstance(output, Tensor)
            what = tuple(output.shape) if tensor else f"a {type(output).__name__}"
            self._refuse(
                call, f"gave {what} for a batch of {call.batch_size}", KEEP_THE_BATCH if tensor else ONE_TENSOR
            )
            return output
        saved = (*saved, *use.marks(output))
        tapped = Tap.apply(
            output,
            call.probe,
            Tapped(self.name, tuple(trainable), use.per_example, traced),
            call,
            len(saved),
            *saved,
            *trainable.values(),
        )
        return tapped if folded is None else tapped.flatten(0, 1)

    def _refuse(self, call: Call, reason: str, remedy: str) -> None:
        """Note the refusal; the clipper raises all of a forward at its end."""
        call.refuse(Refusal.of(self.name, self.module, reason, remedy))


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
        """The bias, (B, ..., heads, queries, keys) in the place of (1, ..., heads, queries, keys)."""
        weight, looked_up = self.module.weight, []
        original = type(self.attention).compute_bias
        call = self.clipper.call_of(self.name) if weight.requires_grad else None
        if call is None or not call.batch_size:
            return original(self.attention, *args, **kwargs)
        handle = self.module.register_forward_pre_hook(lambda module, given: looked_up.append(given[0]))
        with handle, replaced(self.module, {"weight": weight.detach()}):
            bias = original(self.attention, *args, **kwargs)
        (rows,) = looked_up  # (queries, keys)
        note_uses(call, self.name, [weight])

        def per_example(saved: tuple[Tensor, ...], grad: Tensor) -> dict[str, Gradient]:
            left = saved[0].flatten().expand(len(grad), -1)  # (B, queries keys)
            right = grad.movedim(-3, -1).reshape(*left.shape, grad.shape[-3])  # (B, queries keys, heads)
            return {"weight": Outer(left, right, rows=self.module.num_embeddings).dense()}  # a small table

        tapped = Tapped(self.name, self.names, per_example)
        return Tap.apply(bias.expand(call.batch_size, *bias.shape[1:]), call.probe, tapped, call, 1, rows, weight)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors among values, in mappings and sequences, too, in their order."""
    for value in values.values() if isinstance(values, Mapping) else values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (Mapping, list, tuple)):
            yield from tensors_in(value)


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
    return graph_task() != -1


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    """What stands in the place of a parameter, by its name below the module."""
    path, _, key = name.rpartition(".")
    found = (module.get_submodule(path) if path else module)._parameters[key]
    return cast(nn.Parameter, found)


def _redirected() -> bool:
    """Whether saved tensors are redirected: by a checkpoint, a reversible sequence, offloading."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
