"""The patched forward of a layer that has a rule: it records the use, and ends in a norm hook."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from memsave.ghost import _torch_internals as internals
from memsave.ghost.backward_context import BackwardContext
from memsave.ghost.gradients import Gradient, PerSampleGrad, has_values
from memsave.ghost.norm_hook import HookSpec, apply_norm_hook
from memsave.ghost.operator_trace import CONSTANT, OperatorTrace
from memsave.ghost.parameter_swap import parameters_are_swapped, swapped_parameters
from memsave.ghost.refusals import LayerRefused, Refusal
from memsave.ghost.rows import STANDARD, Lost, Rows, RowSplit
from memsave.ghost.rule import LayerInputs, Rule, RuleOutput
from memsave.processes import class_of, is_sharded

KEEP_THE_BATCH = (
    "keep the batch in dimension 0 of its output (expand to the batch what is the same for all examples), or freeze it"
)
RETURN_A_TENSOR = "let its forward return one tensor with the examples in one dimension, or freeze it"
ATTACH_AGAIN = "call clipper.attach(), so that the next forward is followed from the start, and run it again"


class LayerPatch:
    """Replaces a module's forward by one that ends in a norm hook.

    Which of its parameters are trainable is read at each forward.
    """

    def __init__(self, clipper: Any, module: nn.Module, *, rule: Rule, name: str, parameter_names: tuple[str, ...]):
        self.clipper, self.module, self.rule = clipper, module, rule
        self.name, self.parameter_names = name, parameter_names
        self._detached = False
        self.cache: dict[Any, Any] = {}
        self.original = partial(type(module).forward, module)
        module.forward = self.forward

    def detach(self) -> None:
        """Restore the module's forward; a patch that another function wraps stays, and does nothing from now on."""
        self._detached = True
        if getattr(vars(self.module).get("forward"), "__self__", None) is self:
            del self.module.__dict__["forward"]

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerPatch":
        """For a copy of the model, which has no clipper: the copy does nothing."""
        copy = memo[id(self)] = object.__new__(LayerPatch)
        copy._detached = True
        copy.module = deepcopy(self.module, memo)
        copy.original = partial(type(copy.module).forward, copy.module)
        return copy

    @property
    def detached(self) -> bool:
        """Whether the patch does nothing any more."""
        return self._detached

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward; with gradients enabled, its output has a norm hook."""
        if self._detached or parameters_are_swapped():  # in the second case a rule runs it
            return self.original(*args, **kwargs)
        trainable = {name: p for name in self.parameter_names if (p := _parameter(self.module, name)).requires_grad}
        context = self.clipper.context_for(self.name) if trainable else None
        if context is None or not context.batch_size:
            return self.original(*args, **kwargs)
        foreign = [name for name, p in trainable.items() if not self.clipper.holds(p)]
        if foreign:
            self._refuse(context, *_reason_of(foreign[0], trainable[foreign[0]]))
            return self.original(*args, **kwargs)
        trace = context.trace
        if trace is not None and _is_followed(trace, args, kwargs):
            of_memsave = self.rule.__module__.startswith("memsave.ghost.rules")  # these draw no random numbers
            if not (of_memsave and _has_equal_rows(trace, args, kwargs)):
                return self.original(*args, **kwargs)
            one = self.original(args[0][:1])  # expanded, its gradient is known to be a sum over the rows
            return one.expand(len(args[0]), *one.shape[1:]).contiguous()  # as it would be, for writes in place
        try:
            rule_output = self.rule(
                self.module,
                LayerInputs(args, kwargs, context.row_count, tuple(trainable), self.name, self.cache),
            )
        except LayerRefused as refused:
            self._refuse(context, refused.reason, refused.remedy)
            return self.original(*args, **kwargs)
        if rule_output is None:
            if trace is None:
                self._refuse(context, "has no rule for this call, unlike in the first forward", ATTACH_AGAIN)
            return self.original(*args, **kwargs)
        context.record_use(self.name, trainable.values(), by=class_of(self.module).__name__)
        with swapped_parameters(self.module, {name: p.detach() for name, p in trainable.items()}):
            output = self.original(*rule_output.args, **rule_output.kwargs)
        return self._with_norm_hook(context, rule_output, output, trainable)

    def _with_norm_hook(
        self, context: BackwardContext, rule_output: RuleOutput, output: Any, trainable: dict[str, nn.Parameter]
    ) -> Any:
        if not isinstance(output, Tensor) or not output.dim():
            kind = f"a {type(output).__name__}"
            self._refuse(context, f"returned {kind} for a batch of {context.batch_size}", RETURN_A_TENSOR)
            return output
        rows = self._rows(context, output)
        if rows is None:
            return output
        per_example_grads = _by_rows(rule_output, rows)
        spec = HookSpec(self.name, tuple(trainable), per_example_grads, rows)
        hooked = apply_norm_hook(output, spec, context, rule_output.saved, list(trainable.values()))
        if context.trace is not None:
            context.trace.needed |= not rows.standard
            context.trace.set(hooked, rows)
        return hooked

    def _rows(self, context: BackwardContext, output: Tensor) -> Rows | None:
        """Where the examples are in the output; None, with a refusal, if that is not known."""
        trace, batch_size = context.trace, context.batch_size
        found = None if trace is None else trace.provenance(output)
        if batch_size == 1:
            return STANDARD if len(output) == 1 else Rows(0, (0,) * len(output))
        if isinstance(found, Rows):
            return found
        if isinstance(found, Lost):
            reason = f"returned {tuple(output.shape)} for a batch of {batch_size}, and the rows could not be followed"
            self._refuse(context, f"{reason} to their examples (after {found.operator})", KEEP_THE_BATCH)
            return None
        if not context.has_rows(output):
            remedy = KEEP_THE_BATCH if trace is not None else ATTACH_AGAIN
            self._refuse(context, f"returned {tuple(output.shape)} for a batch of {batch_size}", remedy)
            return None
        return context.rows

    def _refuse(self, context: BackwardContext, reason: str, remedy: str) -> None:
        """Record the refusal; the clipper raises all refusals of a forward at its end."""
        context.refuse(Refusal.of(self.name, self.module, reason, remedy))


def _is_followed(trace: OperatorTrace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the operators inside the layer are followed instead, because its input is the same for all examples."""
    tensors = list(tensors_in([*args, *kwargs.values()]))
    if any(trace.source(each) is not None for each in tensors):
        return True
    if not tensors or trace.context.batch_size == 1:
        return False
    x = tensors[0]
    if trace.provenance(x) is not None:
        return False
    return not trace.context.has_rows(x) or trace.known(x) is CONSTANT


def _has_equal_rows(trace: OperatorTrace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the only argument is a constant with equal rows, such as positions that are expanded to the batch."""
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or trace.known(args[0]) is not CONSTANT:
        return False
    x = args[0]
    return x.dim() > 1 and len(x) > 1 and has_values(x) and bool((x == x[:1]).all())


def _by_rows(rule_output: RuleOutput, rows: Rows) -> Any:
    """The rule's gradients, from an output with any Rows."""
    rule, stacks = rule_output.per_example_grads, rule_output.stacks

    def per_example_grads(saved: tuple[Tensor, ...], grad: Tensor, split: RowSplit) -> dict[str, Gradient]:
        if rows.standard:
            return rule(saved, grad)
        if stacks:
            return rule(tuple(split.stacked(each) for each in saved), split.stacked(grad))
        found: dict[str, Gradient] = {}
        for name, gradient in rule(saved, split.rows_first(grad)).items():
            values = gradient.values if isinstance(gradient, PerSampleGrad) else gradient.per_sample().values
            found[name] = PerSampleGrad(split.summed(values))
        return found

    return per_example_grads


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors among the values, also in mappings and sequences, in their order."""
    for value in values.values() if isinstance(values, Mapping) else values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (Mapping, list, tuple)):
            yield from tensors_in(value)


def _reason_of(name: str, parameter: Tensor) -> tuple[str, str]:
    """Why a parameter in a layer is none of the model's, and the remedy."""
    if is_sharded(parameter):
        reason = f"runs while its {name} is sharded, because the forward of the module that FSDP shards is not called"
        return reason, "call that module, or shard the modules that are called"
    reason = f"has another tensor in the place of its {name} (torch.func.functional_call does that)"
    return reason, "call the model with its own parameters"


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    """What is in the place of a parameter of the module."""
    return cast(nn.Parameter, internals.own_parameters(module)[name])
