"""The patched forward of a layer: it records the use, and ends in a norm hook."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from memsave.ghost import _torch_internals as internals
from memsave.ghost.backward_context import BackwardContext
from memsave.ghost.gradients import FactoredGrad, Gradient
from memsave.ghost.norm_hook import HookSpec, apply_norm_hook
from memsave.ghost.parameter_swap import parameters_are_swapped, swapped_parameters
from memsave.ghost.proxies import ParameterProxies
from memsave.ghost.refusals import LayerRefused, Refusal, source_of
from memsave.ghost.rule import LayerInputs, RuleOutput
from memsave.ghost.rules import generic, rule_for

KEEP_THE_BATCH = (
    "keep the batch in dimension 0 of its output (expand to the batch what is the same for all examples), or freeze it"
)
RETURN_A_TENSOR = (
    "let its forward return one tensor with the batch in dimension 0, as a subclass can (for an LSTM with "
    "batch_first=True: return super().forward(x)[0]), or freeze it"
)


class LayerPatch:
    """Replaces a module's forward by one that ends in a norm hook.

    Which of its parameters are trainable is read at each forward.
    """

    def __init__(self, clipper: Any, module: nn.Module, *, name: str, parameter_names: tuple[str, ...]):
        self.clipper, self.module, self.name, self.parameter_names = clipper, module, name, parameter_names
        self.folded = self._detached = False
        self.cache: dict[Any, Any] = {}
        self._instance_forward: Any = vars(module).get("forward")
        """The forward that was set on the instance before, for instance by accelerate."""
        self.original = self._instance_forward or partial(type(module).forward, module)
        plain = self._instance_forward is None and set(parameter_names) <= {"weight", "bias"}  # as rules expect
        plain = plain and not any(p.is_complex() for p in module.parameters())
        self.rule = rule_for(module) if plain else generic
        self.class_name = type(module).__name__
        if self._instance_forward is not None:
            self.class_name += f" with the forward {source_of(self._instance_forward)}"
        module.forward = self.forward

    def detach(self) -> None:
        """Restore the module's forward; a patch that another function wraps stays, and does nothing from now on."""
        self._detached = True
        if getattr(vars(self.module).get("forward"), "__self__", None) is self:
            del self.module.__dict__["forward"]
            if self._instance_forward is not None:
                self.module.forward = self._instance_forward

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerPatch":
        """For a copy of the model, which has no clipper: the copy does nothing."""
        copy = memo[id(self)] = object.__new__(LayerPatch)
        copy._detached = True
        copy.module = deepcopy(self.module, memo)
        before = self._instance_forward and deepcopy(self._instance_forward, memo)
        copy.original = before or partial(type(copy.module).forward, copy.module)
        return copy

    @property
    def detached(self) -> bool:
        """Whether the patch does nothing any more."""
        return self._detached

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward; with gradients enabled, its output has a norm hook."""
        if self._detached or parameters_are_swapped():  # in the second case it is a part of another layer
            return self.original(*args, **kwargs)
        trainable = {name: p for name in self.parameter_names if (p := _parameter(self.module, name)).requires_grad}
        context = self.clipper.context_for(self.name) if trainable else None
        if context is None or not context.batch_size:
            return self.original(*args, **kwargs)
        foreign = [name for name, p in trainable.items() if not self.clipper.holds(p)]
        if foreign:
            self._refuse(
                context,
                f"has another tensor in the place of its {foreign[0]} (torch.func.functional_call does that)",
                "call the model with its own parameters",
            )
            return self.original(*args, **kwargs)
        try:
            rule_output = self.rule(
                self.module,
                LayerInputs(
                    args,
                    kwargs,
                    context.batch_size,
                    tuple(trainable),
                    self.name,
                    self.class_name,
                    self.original,
                    self.cache,
                ),
            )
        except LayerRefused as refused:
            self._refuse(context, refused.reason, refused.remedy)
            return self.original(*args, **kwargs)
        context.record_use(self.name, list(trainable.values()))
        proxies = None
        if rule_output.replay_tolerance is None:
            stand_ins = {name: p.detach() for name, p in trainable.items()}
        else:
            proxies = ParameterProxies(self.name, rule_output.replay_tolerance)
            stand_ins = {name: proxies.make(name, p) for name, p in trainable.items()}
            context.record_proxies(proxies)
        with swapped_parameters(self.module, stand_ins):
            output = self.original(*rule_output.args, **rule_output.kwargs)
        return self._with_norm_hook(context, rule_output, output, trainable, proxies)

    def _with_norm_hook(
        self,
        context: BackwardContext,
        rule_output: RuleOutput,
        output: Any,
        trainable: dict[str, nn.Parameter],
        proxies: ParameterProxies | None,
    ) -> Any:
        saved, batch_size, folded = rule_output.saved, context.batch_size, None
        if self.folded and proxies is None and isinstance(output, Tensor) and len(output) != batch_size:
            folded = (batch_size, len(output) // batch_size)
            output, saved = output.unflatten(0, folded), tuple(each.unflatten(0, folded) for each in saved)
        if not isinstance(output, Tensor) or not output.dim() or len(output) != batch_size:
            is_tensor = isinstance(output, Tensor)
            found = tuple(output.shape) if is_tensor else f"a {type(output).__name__}"
            remedy = KEEP_THE_BATCH if is_tensor else RETURN_A_TENSOR
            self._refuse(context, f"returned {found} for a batch of {batch_size}", remedy)
            return output
        saved = (*saved, *rule_output.fingerprint(output))
        spec = HookSpec(self.name, tuple(trainable), rule_output.per_example_grads, proxies)
        hooked = apply_norm_hook(output, spec, context, saved, list(trainable.values()))
        return hooked if folded is None else hooked.flatten(0, 1)

    def _refuse(self, context: BackwardContext, reason: str, remedy: str) -> None:
        """Record the refusal; the clipper raises all refusals of a forward at its end."""
        context.refuse(Refusal.of(self.name, self.module, reason, remedy))


class RelativeBiasPatch:
    """Expands T5's relative attention bias to the batch where it is computed, because the table has no batch axis.

    The indices into the table depend on positions alone, so the bias is the same for all examples; its gradient is not.
    """

    parameter_names = ("weight",)

    def __init__(self, clipper: Any, attention: Any, *, name: str):
        self.clipper, self.attention, self.name = clipper, attention, name
        self.module = attention.relative_attention_bias
        attention.compute_bias = self.compute_bias

    @staticmethod
    def applies(module: nn.Module) -> bool:
        """Whether the module computes such a bias from a trainable table."""
        table = getattr(module, "relative_attention_bias", None)
        return hasattr(module, "compute_bias") and isinstance(table, nn.Embedding) and table.weight.requires_grad

    def detach(self) -> None:
        """Restore the attention's own method."""
        del self.attention.__dict__["compute_bias"]

    def compute_bias(self, *args: Any, **kwargs: Any) -> Tensor:
        """The bias, (B, ..., heads, queries, keys) instead of (1, ..., heads, queries, keys)."""
        weight, looked_up = self.module.weight, []
        original = type(self.attention).compute_bias
        context = self.clipper.context_for(self.name) if weight.requires_grad else None
        if context is None or not context.batch_size:
            return original(self.attention, *args, **kwargs)
        handle = self.module.register_forward_pre_hook(lambda module, inputs: looked_up.append(inputs[0]))
        with handle, swapped_parameters(self.module, {"weight": weight.detach()}):
            bias = original(self.attention, *args, **kwargs)
        (index,) = looked_up  # (queries, keys)
        context.record_use(self.name, [weight])

        def per_example_grads(saved: tuple[Tensor, ...], grad: Tensor) -> dict[str, Gradient]:
            one_hot = saved[0].flatten().expand(len(grad), -1)  # (B, queries keys)
            grads = grad.movedim(-3, -1).reshape(*one_hot.shape, grad.shape[-3])  # (B, queries keys, heads)
            factored = FactoredGrad(grads, one_hot, transposed=True, num_embeddings=self.module.num_embeddings)
            return {"weight": factored.per_sample()}  # the table is small

        spec = HookSpec(self.name, self.parameter_names, per_example_grads)
        return apply_norm_hook(bias.expand(context.batch_size, *bias.shape[1:]), spec, context, (index,), [weight])


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors among the values, also in mappings and sequences, in their order."""
    for value in values.values() if isinstance(values, Mapping) else values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (Mapping, list, tuple)):
            yield from tensors_in(value)


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    """What is in the place of a parameter, by its name below the module."""
    path, _, key = name.rpartition(".")
    return cast(nn.Parameter, internals.own_parameters(module.get_submodule(path) if path else module)[key])
