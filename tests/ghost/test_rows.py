"""Layers whose rows are not the examples: folded, time first, permuted, gathered, or without a batch axis."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memsave.ghost.rows import Rows, RowSplit
from tests.support.examples_alone import assert_exact_alone, draw, draw_ids

pytestmark = pytest.mark.usefixtures("device")

WIDTH = 4
SIZES = [(1, 3), (4, 3), (3, 3), (2, 5)]  # (examples, positions): one example, as many examples as positions


class Model(nn.Module):
    """A linear layer, a norm and a head, between which the subclasses move the rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.norm, self.head = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)

    def body(self, rows):
        return self.norm(self.first(rows).tanh())


class Folded(Model):
    def forward(self, x):  # (B, T, d)
        rows = self.body(x.view(-1, x.shape[-1]))  # (B T, d)
        return self.head(rows).view(*x.shape[:2], -1)


class FoldedInTheMiddle(Model):
    """The first and the last layer see (B, T, d), the norm sees (B T, d)."""

    def forward(self, x):
        y = self.first(x)
        return self.head(self.norm(y.flatten(0, 1)).unflatten(0, y.shape[:2]))


class TimeFirst(Model):
    def forward(self, x):
        return self.head(self.body(x.transpose(0, 1))).transpose(0, 1)


class FoldedTimeFirst(Model):
    """The rows of an example are B apart."""

    def forward(self, x):
        rows = self.body(x.transpose(0, 1).reshape(-1, WIDTH))  # (T B, d)
        return self.head(rows).view(x.shape[1], x.shape[0], -1).transpose(0, 1)


class FoldedHeads(Model):
    """Attention heads are folded in front of the examples."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(2, 2)

    def forward(self, x):
        batch, length = x.shape[:2]
        heads = self.first(x).view(batch, length, 2, 2).permute(2, 0, 1, 3).reshape(2 * batch, length, 2)
        y = self.inside(heads).tanh().view(2, batch, length, 2).permute(1, 2, 0, 3).reshape(batch, length, WIDTH)
        return self.head(self.norm(y))


class FoldedFrames(nn.Module):
    """A convolution and a group norm over the frames of each example."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.Linear(4, 2)

    def forward(self, x):
        frames = x.view(-1, 1, 2, 2)  # (B T, 1, 2, 2)
        y = self.norm(self.conv(F.pad(frames, (1, 1, 1, 1))).tanh()).mean((2, 3))
        return self.head(y).unflatten(0, x.shape[:2])


class OverlappingPatches(Model):
    """Each row occurs in two patches."""

    def forward(self, x):
        patches = x.unfold(1, 2, 1).transpose(2, 3)  # (B, T - 1, 2, d)
        rows = self.body(patches.reshape(-1, 2, WIDTH)).mean(1)
        return self.head(rows).view(len(x), -1, 2)


class Sorted(Model):
    """All positions of all examples in the order of their first number, then put back."""

    def forward(self, x):
        rows = x.flatten(0, 1)
        order = rows[:, 0].argsort()
        y = self.head(self.body(rows[order]))
        return torch.zeros_like(y).index_copy(0, order, y).view(*x.shape[:2], -1)


class SortedExamples(Model):
    """The examples in the order of a number, as for packing by length."""

    def forward(self, x):
        order = x[:, 0, 0].argsort()
        return self.head(self.body(x[order]))[order.argsort()]


class Masked(Model):
    """The positions of a boolean mask: examples have different numbers of rows, and the first one has none."""

    def forward(self, x):
        mask = self.mask(x)
        out = torch.zeros(*x.shape[:2], 2, dtype=x.dtype)
        out[mask] = self.head(self.body(x[mask]))
        return out + x.sum(-1, keepdim=True)

    def mask(self, x):
        mask = x[..., 1] > -0.5
        return mask & (x[:, :1, 0] != 9)


class MaskedHead(Masked):
    """Only the head sees the masked positions, as in a masked language model; its rows are summed by example."""

    def forward(self, x):
        mask = self.mask(x)
        logits = self.head(self.body(x)[mask])  # (N, 2)
        example = mask.nonzero()[:, 0]
        return torch.zeros(len(x), 2, dtype=x.dtype).index_add(0, example, logits.sin())


class Selected(Model):
    """Rows by `index_select` and `gather`: the last position whose number is positive."""

    def forward(self, x):
        y = self.body(x)
        last = (x[..., 0] > 0).int().cumsum(1).argmax(1)
        picked = y.gather(1, last[:, None, None].expand(-1, 1, WIDTH))[:, 0]
        again = y.flatten(0, 1).index_select(0, torch.arange(len(x)) * x.shape[1] + last)
        return self.head(picked + again.tanh())


class Repeated(Model):
    """Each example has as many rows as its first number says."""

    def forward(self, x):
        counts = x[:, 0, 0].abs().int() + 1
        example = torch.arange(len(x)).repeat_interleave(counts)
        y = self.head(self.body(x.repeat_interleave(counts, 0)).sin()).sum(1)
        return torch.zeros(len(x), 2, dtype=x.dtype).index_add(0, example, y)


class TwoViews(Model):
    """Two views of each example behind each other in the batch."""

    def forward(self, x):
        one, two = self.head(self.body(torch.cat([x, -x]))).chunk(2)
        return one * two


class OneByOne(Model):
    """A loop over the examples, each without a batch axis."""

    def forward(self, x):
        return torch.stack([self.head(self.body(example)) for example in x])


class OneByOneInPlace(Model):
    def forward(self, x):
        out = torch.zeros(*x.shape[:2], 2, dtype=x.dtype)
        for number, example in enumerate(x):
            out[number] = self.head(self.body(example))
        return out


class StepByStep(Model):
    """A loop over time."""

    def forward(self, x):
        state, states = torch.zeros_like(x[:, 0]), []
        for step in x.unbind(1):
            state = self.body(step + state)
            states.append(self.head(state))
        return torch.stack(states, 1)


class Ragged(Model):
    """Positions without padding, as one long sequence, split again."""

    def forward(self, x):
        lengths = ((x[:, 0, 0].abs() * 2).int() % x.shape[1] + 1).tolist()
        packed = torch.cat([example[:length] for example, length in zip(x, lengths, strict=True)])
        parts = self.head(self.body(packed)).split(lengths)
        return nn.utils.rnn.pad_sequence(parts, batch_first=True)


ALL = [
    *(Folded, FoldedInTheMiddle, TimeFirst, FoldedTimeFirst, FoldedHeads, FoldedFrames, OverlappingPatches),
    *(Sorted, SortedExamples, Masked, MaskedHead, Selected, Repeated, TwoViews),
    *(OneByOne, OneByOneInPlace, StepByStep, Ragged),
]


@pytest.mark.parametrize(("batch", "length"), SIZES)
@pytest.mark.parametrize("model", ALL)
def test_rows_that_are_not_examples_are_exact(model, batch, length):
    x = draw(batch, length, WIDTH)
    if batch > 1:
        x[0, 0, 0] = 9.0
    assert_exact_alone(model().double(), x)


class NanoGPT(nn.Module):
    """Positions are looked up without a batch axis; the head is tied."""

    def __init__(self, vocabulary=7, length=6):
        super().__init__()
        torch.manual_seed(3)
        self.wte, self.wpe = nn.Embedding(vocabulary, WIDTH), nn.Embedding(length, WIDTH)
        self.mix, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, vocabulary, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, ids):  # (B, T)
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))  # (T, d)
        return self.lm_head(self.norm(x + self.mix(x).tanh()))


class PositionsOnTheirOwn(NanoGPT):
    """Every layer except the tied one also sees positions alone."""

    def forward(self, ids):
        positions = self.norm(self.mix(self.wpe.weight[: ids.shape[1]]))  # (T, d)
        return self.lm_head((self.wte(ids) * positions).tanh() + self.mix(self.wte(ids)))


class RelativeBias(nn.Module):
    """Attention with a bias by distance, like T5's: the table is looked up without a batch axis."""

    def __init__(self, vocabulary=7, heads=2, buckets=5):
        super().__init__()
        torch.manual_seed(3)
        self.look, self.bias = nn.Embedding(vocabulary, WIDTH), nn.Embedding(buckets, heads)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.heads, self.buckets = heads, buckets

    def forward(self, ids):
        batch, length = ids.shape
        q, k, v = self.qkv(self.look(ids)).view(batch, length, 3, self.heads, -1).permute(2, 3, 0, 1, 4)  # (h, B, T, e)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        bias = self.bias(distance.clamp(-2, 2) + 2).permute(2, 0, 1)[:, None]  # (h, 1, T, T)
        y = (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v
        return self.out(y.permute(1, 2, 0, 3).reshape(batch, length, WIDTH))


@pytest.mark.parametrize(("batch", "length"), SIZES)
@pytest.mark.parametrize("model", [NanoGPT, PositionsOnTheirOwn, RelativeBias])
def test_tables_without_a_batch_axis_are_exact(model, batch, length):
    assert_exact_alone(model().double(), draw_ids(7, batch, length))


def test_a_position_table_of_as_many_rows_as_examples_is_exact():
    assert_exact_alone(NanoGPT(length=4).double(), draw_ids(7, 4, 4))


def windows_of(x, size):
    """(B, H, W, C) as (B windows, size size, C)."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // size, size, width // size, size, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, size * size, channels)


def images_of(windows, size, height, width):
    """The inverse of `windows_of`."""
    channels = windows.shape[-1]
    x = windows.view(-1, height // size, width // size, size, size, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, channels)


def relative_index(size):
    """(size size, size size): the number of each pair's offset."""
    at = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
    offsets = at[:, :, None] - at[:, None] + size - 1
    return offsets[0] * (2 * size - 1) + offsets[1]


class WindowAttention(nn.Module):
    """The attention of Swin: a table of biases, indexed by a buffer."""

    def __init__(self, width=WIDTH, heads=2, size=2):
        super().__init__()
        self.heads, self.size = heads, size
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * size - 1) ** 2, heads))
        self.register_buffer("index", relative_index(size))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def bias(self):  # (h, N, N)
        positions = self.size**2
        table = self.relative_position_bias_table[self.index.view(-1)]
        return table.view(positions, positions, -1).permute(2, 0, 1).contiguous()

    def scores(self, q, k):
        return (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)

    def forward(self, x, mask=None):  # (B windows, N, C), (windows, N, N)
        rows, positions, width = x.shape
        q, k, v = self.qkv(x).view(rows, positions, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = self.scores(q, k) + self.bias()[None]
        if mask is not None:
            many = len(mask)
            scores = scores.view(rows // many, many, self.heads, positions, positions) + mask[None, :, None]
            scores = scores.view(-1, self.heads, positions, positions)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, positions, width))


class ContinuousBias(WindowAttention):
    """The attention of Swin v2: cosines, a learned scale, and biases by a network over a table of coordinates."""

    def __init__(self, width=WIDTH, heads=2, size=2):
        super().__init__(width, heads, size)
        del self.relative_position_bias_table
        self.logit_scale = nn.Parameter(torch.rand(heads, 1, 1) + 1)
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, heads, bias=False))
        offsets = torch.arange(1.0 - size, size)
        self.register_buffer("coordinates", torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), -1)[None])

    def bias(self):
        table = self.cpb_mlp(self.coordinates).view(-1, self.heads)
        positions = self.size**2
        table = table[self.index.view(-1)].view(positions, positions, -1).permute(2, 0, 1)
        return 16 * table.sigmoid()

    def scores(self, q, k):
        cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return cosines * self.logit_scale.clamp(max=4.6).exp()


class SwinBlock(nn.Module):
    """A block on 4 x 4 positions with windows of 2 x 2, shifted by `shift`."""

    def __init__(self, attention, shift):
        super().__init__()
        self.shift, self.attention = shift, attention()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 6), nn.GELU(), nn.Linear(6, WIDTH))
        region = torch.tensor([0, 0, 1, 2]) if shift else torch.zeros(4, dtype=torch.long)
        numbers = windows_of((region[:, None] * 3 + region)[None, :, :, None], 2)[..., 0]  # (windows, N)
        self.register_buffer("mask", (numbers[:, None] != numbers[:, :, None]) * -100.0)

    def forward(self, x):  # (B, 16, C)
        image = self.norm1(x).view(-1, 4, 4, WIDTH)
        shifted = torch.roll(image, (-self.shift, -self.shift), (1, 2)) if self.shift else image
        y = self.attention(windows_of(shifted, 2), self.mask if self.shift else None)
        y = images_of(y, 2, 4, 4)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        x = x + y.view(x.shape)
        return x + self.mlp(self.norm2(x))


class Swin(nn.Module):
    """Two blocks, and patch merging between them and the head."""

    def __init__(self, attention):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.blocks = nn.Sequential(SwinBlock(attention, 0), SwinBlock(attention, 1))
        self.reduction, self.norm = nn.Linear(4 * WIDTH, WIDTH, bias=False), nn.LayerNorm(4 * WIDTH)

    def forward(self, images):  # (B, 1, 8, 8)
        x = self.blocks(self.embed(images).flatten(2).transpose(1, 2)).view(-1, 4, 4, WIDTH)
        corners = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return self.reduction(self.norm(corners.flatten(1, 2)))


@pytest.mark.parametrize("batch", [1, 2, 4])  # 4 windows an example
@pytest.mark.parametrize("attention", [WindowAttention, ContinuousBias])
def test_windows_folded_into_the_batch_are_exact(attention, batch):
    assert_exact_alone(Swin(attention).double(), draw(batch, 1, 8, 8))


def test_the_slots_of_rows_that_depend_on_values_are_never_read_one_by_one():
    examples = torch.tensor([1, 0, 1])
    split = RowSplit(Rows(0, examples), examples, 2)
    assert split._static_slots is None
    expected = RowSplit(Rows(0, (1, 0, 1)), None, 2)
    assert expected._static_slots == [[1, -1], [0, 2]]
    values = draw(3, 2)
    assert torch.equal(split.stacked(values), expected.stacked(values))
