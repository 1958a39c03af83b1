"""PyTorch's recurrent layers and cells, with the tuples that they return."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from tests.support.examples_alone import assert_exact_alone, assert_exact_or_refused, assert_independent, draw
from tests.support.examples_alone import plain_losses as losses

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:dropout option adds dropout"),
]

WIDTH, HIDDEN = 3, 4
KINDS = {
    "LSTM": (nn.LSTM, {}),
    "LSTM proj": (nn.LSTM, {"proj_size": 2}),
    "GRU": (nn.GRU, {}),
    "RNN tanh": (nn.RNN, {}),
    "RNN relu": (nn.RNN, {"nonlinearity": "relu"}),
}
SHAPES = {
    "1 layer": {},
    "both directions": {"bidirectional": True},
    "2 layers both directions": {"num_layers": 2, "bidirectional": True},
    "no bias": {"bias": False},
}


class Reads(nn.Module):
    """A recurrent layer between two linear layers; the losses use its output, its final state, or both."""

    def __init__(self, kind, *, use="both", initial=None, **options):
        super().__init__()
        torch.manual_seed(8)
        self.layer = kind(WIDTH, HIDDEN, **options)
        self.use, self.initial = use, initial
        directions = 2 if self.layer.bidirectional else 1
        size = self.layer.proj_size or HIDDEN
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(size * directions, 2)
        self.last = nn.Linear(size, 2)
        self.start = nn.Linear(WIDTH, size) if initial == "examples" else None
        self.table = nn.Parameter(torch.rand(size)) if initial == "parameter" else None
        self.states = self.layer.num_layers * directions

    def state_of(self, x):
        """(layers, B, hidden) from nothing, zeros, the examples, or a parameter."""
        if self.initial is None:
            return ()
        size = self.layer.proj_size or HIDDEN
        if self.initial == "zeros":
            state = x.new_zeros(self.states, len(x), size)
        elif self.initial == "examples":
            state = self.start(x.mean(1)).expand(self.states, -1, -1)
        else:
            state = self.table.expand(self.states, len(x), -1)
        state = state.contiguous()
        if not isinstance(self.layer, nn.LSTM):
            return (state,)
        return ((state, state.new_zeros(self.states, len(x), HIDDEN) + state.mean(-1, keepdim=True)),)

    def forward(self, x):  # (B, T, d)
        y = self.first(x)
        y, state = self.layer(y if self.layer.batch_first else y.transpose(0, 1), *self.state_of(x))
        y = self.head(y if self.layer.batch_first else y.transpose(0, 1)).flatten(1)
        hidden = state[0] if isinstance(state, tuple) else state  # (layers, B, hidden)
        cell = state[1].mean(-1).t() if isinstance(state, tuple) else hidden.mean(-1).t()  # (B, layers)
        last = torch.cat([self.last(hidden).transpose(0, 1).flatten(1), cell], 1)
        return {"output": y, "state": last, "both": torch.cat([y, last], 1)}[self.use]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_recurrent_layers_are_exact(kind, batch_first, shape):
    layer, options = kind
    model = Reads(layer, batch_first=batch_first, **options, **shape).double()
    assert_exact_alone(model, draw(3, 3, WIDTH))


@pytest.mark.parametrize(("batch", "length"), [(1, 3), (4, 4), (3, 1), (2, 3)])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_exact_for_any_batch(kind, batch_first, batch, length):
    model = Reads(kind, batch_first=batch_first, num_layers=2).double()  # two states: also as many as examples
    assert_exact_alone(model, draw(batch, length, WIDTH))


@pytest.mark.parametrize("use", ["output", "state"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_losses_of_one_part_of_the_tuple_are_exact(kind, use):
    layer, options = kind
    model = Reads(layer, use=use, batch_first=True, bidirectional=True, **options).double()
    assert_exact_alone(model, draw(3, 3, WIDTH))


@pytest.mark.parametrize("initial", ["zeros", "examples", "parameter"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_initial_states_are_exact(kind, initial):
    layer, options = kind
    model = Reads(layer, initial=initial, batch_first=initial != "examples", num_layers=2, **options).double()
    assert_exact_alone(model, draw(3, 3, WIDTH))


@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_with_a_frozen_part_are_exact(kind, frozen):
    model = Reads(kind, batch_first=True).double()
    getattr(model.layer, frozen).requires_grad_(False)
    assert_exact_alone(model, draw(3, 3, WIDTH))


def test_a_recurrent_layer_of_real_size_is_exact():
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(8)
            self.layer, self.head = nn.GRU(WIDTH, 600, batch_first=True), nn.Linear(600, 2)

        def forward(self, x):
            return self.head(self.layer(x)[1][0])

    model = Large().double()
    assert sum(p.numel() for p in model.parameters()) > 2**20
    assert_exact_alone(model, draw(2, 3, WIDTH))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_one_recurrent_layer_used_twice_is_exact(kind):
    class Twice(Reads):
        def forward(self, x):
            y, state = self.layer(self.first(x))
            return self.head(self.layer(y[..., :WIDTH], state)[0])

    assert_exact_alone(Twice(kind, batch_first=True).double(), draw(3, 3, WIDTH))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_called_at_each_step_is_exact(kind):
    class Steps(Reads):
        def forward(self, x):
            state, outputs = None, []
            for step in self.first(x).split(1, dim=1):
                y, state = self.layer(step, state)
                outputs.append(y)
            return self.head(torch.cat(outputs, 1))

    assert_exact_alone(Steps(kind, batch_first=True).double(), draw(3, 3, WIDTH))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_called_for_each_example_is_exact(kind):
    """Without a batch axis: (T, d)."""

    class Loop(Reads):
        def forward(self, x):
            return torch.stack([self.head(self.layer(example)[0]) for example in self.first(x)])

    assert_exact_alone(Loop(kind).double(), draw(3, 3, WIDTH))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_dropout_between_recurrent_layers_is_exact_or_refused(kind):
    model = Reads(kind, batch_first=True, num_layers=2, dropout=0.5).double().train()
    assert_exact_or_refused(model, draw(3, 3, WIDTH))
    with torch.backends.cudnn.flags(enabled=False):  # cuDNN differentiates recurrent layers in train mode alone
        assert_exact_alone(model.eval(), draw(3, 3, WIDTH))


class Packed(Reads):
    """The lengths are a part of the batch; padding is zero in the output."""

    in_order, together = False, False

    def forward(self, batch):
        x, lengths = batch
        y = self.first(x)
        if self.together:
            rows = [row[:length] for row, length in zip(y, lengths.tolist(), strict=True)]
            with torch.device("cpu"):  # where PyTorch needs the lengths
                packed = pack_sequence(rows, enforce_sorted=False)
        else:
            packed = pack_padded_sequence(y, lengths.cpu(), batch_first=True, enforce_sorted=self.in_order)
        packed, state = self.layer(packed)
        y, _ = pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])
        hidden = state[0] if isinstance(state, tuple) else state
        y = self.head(y) * (torch.arange(x.shape[1]) < lengths[:, None])[..., None]
        return torch.cat([y.flatten(1), self.last(hidden).transpose(0, 1).flatten(1)], 1)


class PackedInOrder(Packed):
    in_order = True


class PackedTogether(Packed):
    together = True


@pytest.mark.parametrize("lengths", [(5, 3, 1), (4, 4, 4), (5,)], ids=str)
@pytest.mark.parametrize("model", [Packed, PackedInOrder, PackedTogether])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences_are_exact_or_refused(kind, model, lengths):
    model = model(kind, batch_first=True, bidirectional=True).double()
    batch = draw(len(lengths), 5, WIDTH), torch.tensor(lengths)
    assert_independent(model, batch, losses)
    assert_exact_or_refused(model, batch)


class Cells(nn.Module):
    """A cell in a loop over time, between two linear layers."""

    def __init__(self, kind, **options):
        super().__init__()
        torch.manual_seed(8)
        self.cell, self.first, self.head = kind(WIDTH, HIDDEN, **options), nn.Linear(WIDTH, WIDTH), nn.Linear(HIDDEN, 2)
        self.given = False

    def forward(self, x):
        state, outputs = None, []
        if self.given:
            state = x.new_ones(len(x), HIDDEN) * x[:, 0, :1]
            state = (state, state) if isinstance(self.cell, nn.LSTMCell) else state
        for step in self.first(x).unbind(1):
            state = self.cell(step, state)
            outputs.append(self.head(state[0] if isinstance(state, tuple) else state))
        if isinstance(state, tuple):
            outputs.append(self.head(state[1]))
        return torch.stack(outputs, 1)


CELLS = {
    "LSTMCell": (nn.LSTMCell, {}),
    "GRUCell": (nn.GRUCell, {}),
    "RNNCell": (nn.RNNCell, {}),
    "RNNCell relu": (nn.RNNCell, {"nonlinearity": "relu"}),
    "LSTMCell no bias": (nn.LSTMCell, {"bias": False}),
}


@pytest.mark.parametrize(("batch", "length"), [(1, 4), (4, 4), (3, 1)])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("kind", CELLS.values(), ids=CELLS.keys())
def test_cells_in_a_loop_over_time_are_exact(kind, given, batch, length):
    cell, options = kind
    model = Cells(cell, **options).double()
    model.given = given
    assert_exact_alone(model, draw(batch, length, WIDTH))


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_called_for_each_example_are_exact(kind):
    """Each call sees a batch of one example."""

    class Loop(Cells):
        def forward(self, x):
            return torch.stack([super(Loop, self).forward(example[None])[0] for example in x])

    assert_exact_alone(Loop(kind).double(), draw(3, 3, WIDTH))
