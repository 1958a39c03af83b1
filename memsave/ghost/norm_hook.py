"""The per-example squared gradient norm is itself a gradient: that of a probe.

The probe is a tensor z of shape (B,) whose values nothing reads. A layer runs with its parameters detached, so that
autograd forms the gradient of the layer's input as usual, and none of its weights. Its output then passes through
`NormHook`, an identity that also takes the probe as an input. The backward of the hook has the output's gradient and
the layer's saved input, on which alone the layer's per-example gradients depend, and returns their squared norms as the
gradient of the probe. Autograd adds these up over all layers:

    torch.autograd.grad(losses.sum(), probe)[b]  =  |grad of losses[b]|^2

This holds for any control flow, checkpoints and replays, because these are all part of the graph. The hooks of a
forward hold its `BackwardContext`, whose phase says what a backward must do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memsave.ghost import _torch_internals as internals
from memsave.ghost.backward_context import BackwardContext, Phase
from memsave.ghost.gradients import Gradient, upcast, without_autocast
from memsave.ghost.rows import STANDARD, Rows, RowSplit
from memsave.tf32 import allows_tf32

PerExampleGrads = Callable[[tuple[Tensor, ...], Tensor, RowSplit], dict[str, Gradient]]
"""(saved tensors, the output's gradient, its split by example) to the per-example gradients by parameter name."""

COMPARED = 2**12  # about how many elements of each example's activations are compared between two passes
REPEAT_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}  # of sums of elements, relative to the norm
LOW_PRECISION = 1e-2  # the same for narrower dtypes and TF32


@dataclass(frozen=True)
class HookSpec:
    """What a norm hook needs to know about one use of a parameter, by a layer or an operator."""

    name: str
    parameter_names: tuple[str, ...]
    per_example_grads: PerExampleGrads
    rows: Rows = STANDARD
    """Where the examples are in the output."""


class NormHook(torch.autograd.Function):
    """The identity on an output; the gradient of the probe is the squared norms of the use's parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        probe: Tensor,
        spec: HookSpec,
        context: BackwardContext,
        saved_count: int,
        *tensors: Tensor,
    ) -> Tensor:
        """`tensors`: `saved_count` saved tensors, then the trainable parameters as in `spec.parameter_names`."""
        ctx.hook_spec, ctx.context, ctx.saved_count = spec, context, saved_count
        ctx.save_for_backward(*tensors[:saved_count])
        ctx.parameters = tensors[saved_count:]
        ctx.rounds = output.device.type == "cuda" and torch.is_autocast_enabled("cuda")
        return output.detach()  # autograd must not see a view, or later in-place operations would fail

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Pass the output's gradient on unchanged; then act by the phase."""
        (grad,) = grads
        spec, context = ctx.hook_spec, ctx.context
        nothing = [None] * (3 + ctx.saved_count + len(ctx.parameters))
        context.refuse_other_backward(spec.name)
        saved = tuple(each.detach() for each in ctx.saved_tensors)  # recomputed here, where a trace may follow it
        # Gram matrices must not be bfloat16, and operators of the backward need not be followed
        with torch.no_grad(), without_autocast(grad.device.type), internals.unfollowed():
            if context.phase is Phase.CHECK_INDEPENDENCE:
                context.record_output_grad(spec.name, grad, _split(ctx, saved)[0])
                return grad, None, *nothing
            gradients = _per_example_grads(ctx, saved, grad)
            del saved
            named = [(p, name, gradients.pop(name)) for p, name in zip(ctx.parameters, spec.parameter_names)]
            if context.phase is Phase.MEASURE_NORMS:
                found = []
                for parameter, name, gradient in named:
                    label = name if spec.name in spec.parameter_names else f"{spec.name}.{name}"
                    found.append(context.squared_norms(parameter, gradient, label))
                return grad, sum(found[1:], found[0]).to(context.probe.dtype), *nothing
            for parameter, _, gradient in named:
                context.add_clipped_sum(parameter, gradient)
            return grad, None, *nothing


def _split(ctx: Any, saved: tuple[Tensor, ...]) -> tuple[RowSplit, tuple[Tensor, ...]]:
    """(the split of the rows, the layer's saved tensors); the last saved tensor has the example of each row, if any."""
    rows, examples = ctx.hook_spec.rows, None
    if isinstance(rows.examples, Tensor):
        *saved, examples = saved  # type: ignore[assignment]
    return RowSplit(rows, examples, ctx.context.batch_size), tuple(saved)


def _per_example_grads(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> dict[str, Gradient]:
    split, saved = _split(ctx, saved)
    gradients = ctx.hook_spec.per_example_grads(saved, grad, split)
    if ctx.context.runs_two_passes:
        _compare_passes(ctx, (grad, *saved), split)
    return gradients


def _compare_passes(ctx: Any, tensors: tuple[Tensor, ...], split: RowSplit) -> None:
    """Compare the tensors of the second pass with those of the first by a sum of a sample of each row's elements.

    If they differ, the summed gradients are not those whose norms were measured.
    """
    tensors = tuple(each for each in tensors if each.numel())
    if not tensors:
        ctx.measured = []
        return
    count = len(split.rows_first(tensors[0]))
    rows = [each.reshape(count if each.dim() and len(each) == count else 1, -1) for each in tensors]
    rows = [each[:, :: max(1, each.shape[1] // COMPARED) | 1] for each in rows]
    rows = [upcast(each) if each.is_floating_point() or each.is_complex() else each.double() for each in rows]
    sums = [each.sum(1) for each in rows]
    if ctx.context.phase is Phase.MEASURE_NORMS:
        ctx.measured = [(s, torch.linalg.vector_norm(each, dim=1)) for s, each in zip(sums, rows)]
        return
    for now, (before, norm), tensor in zip(sums, ctx.measured, tensors, strict=True):
        close = (now - before).abs() <= _repeat_tolerance(tensor, ctx.rounds) * norm
        same = (close | (now == before) | now.isnan() & before.isnan()).all()
        ctx.context.record_repeat(ctx.hook_spec.name, same)


def _repeat_tolerance(tensor: Tensor, rounds: bool) -> float:
    """How much two evaluations may differ: on CUDA their order of summation may, which TF32 and autocast make larger.

    `rounds`: whether autocast was on, so that float32 tensors depend on narrower ones.
    """
    if tensor.dtype == torch.float32 and tensor.device.type == "cuda" and (rounds or allows_tf32(tensor.device)):
        return LOW_PRECISION
    return REPEAT_TOLERANCE.get(tensor.dtype, LOW_PRECISION)


def apply_norm_hook(
    output: Tensor, spec: HookSpec, context: BackwardContext, saved: tuple[Tensor, ...], parameters: list[Any]
) -> Tensor:
    """The output with a norm hook; `parameters` in the order of `spec.parameter_names`."""
    if context.observer is not None:
        context.observer(output, spec, saved, parameters)
    if isinstance(spec.rows.examples, Tensor):
        saved = (*saved, spec.rows.examples)
    return NormHook.apply(output, context.probe, spec, context, len(saved), *saved, *parameters)
