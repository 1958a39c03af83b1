"""Convolutions of the examples with a parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from memsave.ghost.convolution import weight_grads
from memsave.ghost.gradients import PerSampleGrad, upcast
from memsave.ghost.operators.general import example_by_example
from memsave.ghost.operators.rule import Operator, operator_rule
from memsave.ghost.refusals import LayerRefused
from memsave.ghost.rows import WHOLE, RowSplit

if TYPE_CHECKING:
    from memsave.ghost.operator_trace import OperatorTrace


@operator_rule("conv1d conv2d conv3d")
def convolution(trace: OperatorTrace, operator: Operator) -> Tensor:
    """`F.conv1d`, `F.conv2d` and `F.conv3d`: x (N, C, ...), weight (O, C / groups, ...), bias (O,)."""
    x, weight, bias = operator.argument(0, "input"), operator.argument(1, "weight"), operator.argument(2, "bias")
    if trace.provenance(x) is None or trace.provenance(weight) is not None or x.dim() != weight.dim() or x.is_complex():
        return example_by_example(trace, operator)
    rows = trace.rows(x)
    if rows is not WHOLE and rows.dim != 0:
        raise LayerRefused("is a kernel over the dimension of the examples", "keep them in dimension 0, or freeze it")
    stride, padding = operator.argument(3, "stride", default=1), operator.argument(4, "padding", default=0)
    dilation, groups = operator.argument(5, "dilation", default=1), operator.argument(6, "groups", default=1)
    of_weight, of_bias = trace.source(weight), None if bias is None else trace.source(bias)
    y = operator.run(lambda each: each if trace.source(each) is None else each.detach())
    shape = tuple(weight.shape)

    def gradient(saved: tuple[Tensor, ...], grad: Tensor, split: RowSplit) -> PerSampleGrad:
        found = weight_grads(
            upcast(saved[0]), upcast(grad), shape, stride=stride, padding=padding, dilation=dilation, groups=groups
        )
        return PerSampleGrad(_sum(found, split))

    if of_weight is not None:
        y = trace.hook(y, of_weight, rows, (x,), gradient)
    if of_bias is not None:
        y = trace.hook(
            y, of_bias, rows, (), lambda _, grad, split: PerSampleGrad(_sum(upcast(grad).flatten(2).sum(2), split))
        )
    return y


def _sum(values: Tensor, split: RowSplit) -> Tensor:
    return values.sum(0, keepdim=True) if split.rows is WHOLE else split.summed(values)
