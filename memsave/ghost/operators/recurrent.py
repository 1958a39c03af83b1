"""Recurrent layers and cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memsave.ghost.operators.broadcasting import with_rows
from memsave.ghost.operators.rule import Operator, operator_rule
from memsave.ghost.refusals import LayerRefused
from memsave.ghost.rows import WHOLE, Rows

if TYPE_CHECKING:
    from memsave.ghost.operator_trace import OperatorTrace


@operator_rule("lstm gru rnn_tanh rnn_relu")
def layers(trace: OperatorTrace, operator: Operator) -> Any:
    """`nn.LSTM`, `nn.GRU` and `nn.RNN`: each example is a sequence of its own, with its own copy of the weights.

    A packed sequence is taken apart into the sequences of the examples.
    """
    x, second = operator.args[:2]
    packed = isinstance(second, Tensor) and second.dtype == torch.long and second.device.type == "cpu" and x.dim() == 2
    states, weights = (operator.args[2], operator.args[3]) if packed else (second, operator.args[2])
    states = tuple(states) if isinstance(states, (tuple, list)) else (states,)
    options = operator.args[4:] if packed else operator.args[3:]
    _, count, dropout, training = options[:4]
    if dropout and training and count > 1:
        raise LayerRefused(
            "belongs to recurrent layers with dropout between them, which would draw other masks for each example",
            "set that dropout to 0, and put nn.Dropout between single layers",
        )
    batch = trace.context.batch_size
    along_batch = WHOLE if batch == 1 else Rows(0)
    copies = [
        each if (source := trace.source(each)) is None else trace.copies(source, (batch, *each.shape), along_batch)
        for each in weights
    ]
    followed = [trace.source(each) is not None for each in weights]
    is_tuple = operator.name == "lstm"
    size = int(second[0]) if packed else x.shape[0 if options[-1] else 1] if x.dim() == 3 else 1
    states = tuple(with_rows(trace, each, WHOLE if batch == 1 else Rows(1), size) for each in states)
    if packed:
        return _packed(trace, operator, x, second, states, copies, followed, options, is_tuple)
    *_, batch_first = options
    dim = 0 if batch_first else 1
    if x.dim() == 2:  # one sequence without a batch
        dim = 0
    examples = _examples(trace, x, dim)
    outputs = []
    for place, example in enumerate(examples):
        own = [each[example] if is_copy else each for each, is_copy in zip(copies, followed, strict=True)]
        state = tuple(each[:, place : place + 1].contiguous() for each in states)
        part = x.narrow(dim, place, 1) if x.dim() == 3 else x
        outputs.append(operator.function(part, state if is_tuple else state[0], own, *options))
    first, *rest = zip(*outputs, strict=True)
    return (torch.cat(first, dim), *(torch.cat(each, 1) for each in rest))


def _examples(trace: OperatorTrace, x: Tensor, dim: int) -> list[int]:
    rows = trace.rows(x)
    if rows is WHOLE:
        return [0] * x.shape[dim]
    examples = list(range(x.shape[rows.dim])) if rows.examples is None else torch.as_tensor(rows.examples).tolist()
    if rows.dim == dim:
        return [int(each) for each in examples]
    if len(set(examples)) == 1:  # all of it belongs to one example
        return [int(examples[0])] * x.shape[dim]
    raise LayerRefused("belongs to a recurrent layer over the dimension of the examples", "keep them in its batch")


def _packed(
    trace: OperatorTrace,
    operator: Operator,
    data: Tensor,
    batch_sizes: Tensor,
    states: tuple[Tensor, ...],
    copies: list[Tensor],
    followed: list[bool],
    options: tuple[Any, ...],
    is_tuple: bool,
) -> Any:
    sizes = batch_sizes.tolist()
    starts = [sum(sizes[:step]) for step in range(len(sizes))]
    owners = _examples(trace, data, 0)
    outputs, places = [], []
    for sequence in range(sizes[0]):
        positions = [start + sequence for start, size in zip(starts, sizes, strict=True) if size > sequence]
        own = [each[owners[sequence]] if is_copy else each for each, is_copy in zip(copies, followed, strict=True)]
        state = tuple(each[:, sequence : sequence + 1].contiguous() for each in states)
        index = torch.tensor(positions, device=data.device)
        steps = torch.ones(len(positions), dtype=torch.long, device="cpu")
        outputs.append(operator.function(data[index], steps, state if is_tuple else state[0], own, *options))
        places += positions
    first, *rest = zip(*outputs, strict=True)
    order = torch.tensor(places, device=data.device).argsort()
    return (torch.cat(first)[order], *(torch.cat(each, 1) for each in rest))


@operator_rule("rnn_tanh_cell rnn_relu_cell")
def simple_cell(trace: OperatorTrace, operator: Operator) -> Tensor:
    """h' = act(W_ih x + b_ih + W_hh h + b_hh)."""
    x, h, w_x, w_h, b_x, b_h = _arguments(operator)
    with trace:
        sums = F.linear(x, w_x, b_x) + F.linear(h, w_h, b_h)
        return sums.tanh() if operator.name == "rnn_tanh_cell" else sums.relu()


@operator_rule("gru_cell")
def gru_cell(trace: OperatorTrace, operator: Operator) -> Tensor:
    """The equations of `nn.GRUCell`."""
    x, h, w_x, w_h, b_x, b_h = _arguments(operator)
    with trace:
        of_x, of_h = F.linear(x, w_x, b_x).chunk(3, -1), F.linear(h, w_h, b_h).chunk(3, -1)
        reset, update = (of_x[0] + of_h[0]).sigmoid(), (of_x[1] + of_h[1]).sigmoid()
        new = (of_x[2] + reset * of_h[2]).tanh()
        return new + update * (h - new)


@operator_rule("lstm_cell")
def lstm_cell(trace: OperatorTrace, operator: Operator) -> tuple[Tensor, Tensor]:
    """The equations of `nn.LSTMCell`."""
    x, (h, c), w_x, w_h, b_x, b_h = _arguments(operator)
    with trace:
        gates = (F.linear(x, w_x, b_x) + F.linear(h, w_h, b_h)).chunk(4, -1)
        c = gates[1].sigmoid() * c + gates[0].sigmoid() * gates[2].tanh()
        return gates[3].sigmoid() * c.tanh(), c


def _arguments(operator: Operator) -> tuple[Any, ...]:
    return (*operator.args, None, None)[:6]
