"""Parameters beside children of real size: tokens, scales, tables, state spaces, and children's weights."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memsave.ghost import GhostClipper
from tests.support.examples_alone import assert_exact_alone, draw_ids, plain_losses
from tests.support.large_table import ROWS, WIDTH, BesideTable, parameter
from tests.support.per_example_reference import assert_exact, by_loop

pytestmark = pytest.mark.usefixtures("device")


class ClassToken(BesideTable):
    """A class token and position embeddings, as in ViT."""

    def build(self, length=5):
        self.cls_token, self.positions = parameter(1, 1, WIDTH), parameter(1, length + 1, WIDTH)

    def inside(self, x):
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.positions


class ClassTokenWithoutBatchAxis(ClassToken):
    """The token of CLIP is (d,), and positions of its own are added before the concatenation."""

    def build(self):
        self.cls_token, self.positions = parameter(WIDTH), parameter(6, WIDTH)

    def inside(self, x):
        x = x + self.positions[1:]
        token = (self.cls_token + self.positions[0]).repeat(len(x), 1, 1)
        return torch.cat([token, x], 1)


class Latents(BesideTable):
    """Latents, expanded to the batch, query the tokens."""

    def build(self):
        self.latents, self.key = parameter(3, WIDTH), nn.Linear(WIDTH, WIDTH)

    def inside(self, x):
        latents = self.latents[None].expand(len(x), -1, -1)
        y = (latents @ self.key(x).transpose(1, 2)).softmax(-1) @ x
        return torch.cat([latents, y], 1)


class StackedLatents(Latents):
    def inside(self, x):
        latents = torch.stack([self.latents] * len(x)) * x.mean(1, keepdim=True)
        return torch.cat([latents, self.key(x)], 1)


class LayerScale(BesideTable):
    def build(self):
        self.gamma, self.mix = parameter(WIDTH), nn.Linear(WIDTH, WIDTH)

    def inside(self, x):
        return x + self.gamma * self.mix(x)


class Gated(BesideTable):
    """A scalar gate (Flamingo), a learned interpolation, and a weighted sum of layers (ELMo)."""

    def build(self):
        self.gate, self.share, self.weights = parameter(), parameter(WIDTH), parameter(2)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def inside(self, x):
        y = x + self.gate.tanh() * self.mix(x)
        y = torch.lerp(x, y, self.share.sigmoid())
        return (self.weights.softmax(0)[:, None, None, None] * torch.stack([x, y])).sum(0)


class InPlace(BesideTable):
    def build(self):
        self.scale, self.shift = parameter(WIDTH), parameter(5, 1)

    def inside(self, x):
        y = x.clone()
        y *= self.scale
        y[:, 1:] += self.shift[1:]
        return y


class Mamba(BesideTable):
    """The state space of Mamba, with a causal convolution inside, and the weight of a child used by its parent."""

    def build(self):
        self.in_proj, self.conv1d = nn.Linear(WIDTH, 8), nn.Conv1d(4, 4, 3, groups=4, padding=2)
        self.x_proj, self.dt_proj, self.out_proj = nn.Linear(4, 6), nn.Linear(2, 4), nn.Linear(4, WIDTH)
        self.A_log, self.D = parameter(4, 2), parameter(4)

    def inside(self, x):
        inner, gate = self.in_proj(x).chunk(2, dim=-1)
        inner = F.silu(self.conv1d(inner.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)  # (B, T, 4)
        step, write, read = self.x_proj(inner).split([2, 2, 2], dim=-1)
        step = F.softplus(step @ self.dt_proj.weight.t() + self.dt_proj.bias)  # (B, T, 4)
        decay = torch.exp(step[..., None] * -self.A_log.exp())  # (B, T, 4, 2)
        drive = step[..., None] * write[:, :, None] * inner[..., None]
        state, outputs = torch.zeros_like(decay[:, 0]), []
        for time in range(x.shape[1]):
            state = decay[:, time] * state + drive[:, time]
            outputs.append((state @ read[:, time, :, None])[..., 0])
        y = torch.stack(outputs, 1) + inner * self.D
        return self.out_proj(y * F.silu(gate))


class TimeMix(BesideTable):
    """The token shift and the decay of RWKV."""

    def build(self):
        self.mix, self.decay, self.key = parameter(1, 1, WIDTH), parameter(WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def inside(self, x):
        before = F.pad(x, (0, 0, 1, -1))
        key = self.key(x * self.mix + before * (1 - self.mix))
        total, outputs = torch.zeros_like(x[:, 0]), []
        for step in key.unbind(1):
            total = torch.exp(-torch.exp(self.decay)) * total + step
            outputs.append(total)
        return torch.stack(outputs, 1)


class ChildWeight(BesideTable):
    """The parent uses the weight of a child that it never calls."""

    def build(self):
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3)

    def inside(self, x):
        return F.conv1d(x.transpose(1, 2), self.conv.weight, self.conv.bias, padding=1).transpose(1, 2)


class ChildWeightAndChild(BesideTable):
    """The parent calls the child, and uses its weight."""

    def build(self):
        self.mix = nn.Linear(WIDTH, WIDTH)

    def inside(self, x):
        return self.mix(x).tanh() @ self.mix.weight + self.mix.bias


class Listed(BesideTable):
    def build(self):
        self.scales = nn.ParameterList(nn.Parameter(torch.rand(WIDTH)) for _ in range(3))
        self.named = nn.ParameterDict(
            {"a": nn.Parameter(torch.rand(WIDTH, WIDTH)), "b": nn.Parameter(torch.rand(5, 1))}
        )

    def inside(self, x):
        for scale in self.scales:
            x = x * scale
        return x @ self.named["a"] + self.named["b"]


class AliasedBias(BesideTable):
    """The bias of a masked language model's head is also its decoder's."""

    def build(self):
        self.decoder = nn.Linear(WIDTH, WIDTH)
        self.bias = self.decoder.bias

    def inside(self, x):
        return self.decoder(x)


class AliasedBiasUsedTwice(AliasedBias):
    def inside(self, x):
        return self.decoder(x).tanh() + self.bias


class TiedDecoder(BesideTable):
    """The table is also the weight of a product outside its module; a few rows of it, to be fast."""

    def build(self):
        self.bias = parameter(6)

    def inside(self, x):
        logits = F.linear(x, self.look.weight[:6], self.bias)
        return F.pad(logits, (0, WIDTH - 6))


class TimesScale(nn.Embedding):
    """The scaled embedding of Gemma and BART."""

    def forward(self, ids):
        return super().forward(ids) * self.embedding_dim**0.5


class ScaledEmbedding(BesideTable):
    def build(self):
        self.look, self.token = TimesScale(ROWS, WIDTH, padding_idx=0), parameter(WIDTH)

    def inside(self, x):
        return x + self.token


class FromTable(BesideTable):
    """Tables in parameters: indexed, selected, embedded, gathered, and cut."""

    def build(self):
        self.one, self.two, self.three, self.four = (parameter(7, WIDTH) for _ in range(4))
        self.five = parameter(9, WIDTH)

    def forward(self, ids):
        kinds = ids % 7
        x = self.look(ids) + self.one[kinds] * F.embedding(kinds, self.two)
        x = x * self.three.index_select(0, kinds.flatten()).view(x.shape)
        x = x + self.four.gather(0, kinds.flatten()[:, None].expand(-1, WIDTH)).view(x.shape)
        return self.head((x + self.five[: ids.shape[1]]).tanh())


class LogitScale(BesideTable):
    """CLIP's temperature, between normalised features."""

    def build(self):
        self.logit_scale, self.features = parameter(), parameter(WIDTH, WIDTH)

    def inside(self, x):
        return self.logit_scale.exp() * F.normalize(x, dim=-1) @ F.normalize(self.features, dim=-1).t()


class SetItem(BesideTable):
    """A learned vector replaces masked positions, as in wav2vec 2; the first example has none."""

    def build(self):
        self.token = parameter(WIDTH)

    def forward(self, ids):
        x = self.look(ids).clone()
        x[ids % 3 == 1] = self.token
        return self.head(x.tanh())


class Where(BesideTable):
    def build(self):
        self.token, self.other, self.mix = parameter(1, 1, WIDTH), parameter(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids):
        mask = (ids % 3 == 1)[..., None]
        x = torch.where(mask, self.token, self.look(ids))
        weight = (ids % 2)[..., None].to(x.dtype)
        x = self.mix(x) * (1 - weight) + self.other * weight  # BEiT
        return self.head(x.tanh())


class Sinks(BesideTable):
    """Attention with a learned sink of each head (GPT-OSS), slopes of a distance bias, and rotary frequencies."""

    def build(self):
        self.sinks, self.slopes, self.frequencies = parameter(2), parameter(2, 1, 1), parameter(2)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def inside(self, x):
        batch, length = x.shape[:2]
        q, k, v = self.qkv(x).view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)  # (B, h, T, e)
        angle = torch.outer(torch.arange(length, dtype=x.dtype), self.frequencies)  # (T, 2)
        q, k = (torch.cat([t[..., :2] * angle.cos(), t[..., 2:] * angle.sin()], -1) for t in (q, k))
        distance = (torch.arange(length)[:, None] - torch.arange(length)).abs()
        scores = q @ k.transpose(-1, -2) - self.slopes * distance
        scores = torch.cat([scores, self.sinks.view(1, -1, 1, 1).expand(batch, -1, length, -1)], -1)
        return (scores.softmax(-1)[..., :-1] @ v).transpose(1, 2).reshape(x.shape)


class Memory(BesideTable):
    """Learned keys and values, and a learned mask, in the fused attention."""

    def build(self):
        self.keys, self.values, self.bias = parameter(1, 3, WIDTH), parameter(1, 3, WIDTH), parameter(5, 8)

    def inside(self, x):
        k = torch.cat([self.keys.expand(len(x), -1, -1), x], 1)
        v = torch.cat([self.values.expand(len(x), -1, -1), x], 1)
        return F.scaled_dot_product_attention(x, k, v, attn_mask=self.bias[: x.shape[1]])


class Interpolated(ClassToken):
    """Position embeddings, interpolated to the length."""

    def build(self):
        self.positions = parameter(1, WIDTH, 4)

    def inside(self, x):
        return x + F.interpolate(self.positions, size=x.shape[1], mode="linear").transpose(1, 2)


class Checkpointed(LayerScale):
    def inside(self, x):
        return checkpoint(super().inside, x, use_reentrant=False)


class Distances(BesideTable):
    """Soft assignment to a codebook."""

    def build(self):
        self.codebook = parameter(3, WIDTH)

    def inside(self, x):
        distances = (x[..., None, :] - self.codebook).square().sum(-1)
        return (-distances).softmax(-1) @ self.codebook


MODELS = [
    *(ClassToken, ClassTokenWithoutBatchAxis, Latents, StackedLatents, LayerScale, Gated, InPlace, Mamba, TimeMix),
    *(ChildWeight, ChildWeightAndChild, Listed, AliasedBias, AliasedBiasUsedTwice, TiedDecoder, ScaledEmbedding),
    *(FromTable, LogitScale, SetItem, Where, Sinks, Memory, Interpolated, Checkpointed, Distances),
]


def ids_of(batch, length=5):
    ids = draw_ids(ROWS, batch, length)
    ids[0] = ids[0] // 3 * 3 % ROWS  # no position of the first example is masked
    return ids


@pytest.mark.parametrize("model", MODELS)
def test_parameters_beside_large_children_are_exact(model):
    assert_exact_alone(model().double(), ids_of(2))


@pytest.mark.parametrize("batch", [1, 5])  # 5: as many examples as positions
@pytest.mark.parametrize("model", MODELS)
def test_parameters_beside_children_are_exact_for_any_batch(model, batch):
    small = model(rows=30) if model is not ScaledEmbedding else model()
    assert_exact_alone(small.double(), ids_of(batch) % 30)


@pytest.mark.parametrize("model", [ClassToken, Mamba, ChildWeightAndChild, AliasedBiasUsedTwice, SetItem])
def test_other_clippings_of_own_parameters_are_exact(model):
    assert_exact(model(rows=30).double(), ids_of(4) % 30, plain_losses, clippings=("automatic",))


@pytest.mark.parametrize("model", [ClassToken, Mamba, ChildWeightAndChild, Sinks])
def test_parameters_frozen_and_unfrozen_between_two_forwards_are_exact(model):
    model, ids = model(rows=30).double(), ids_of(3) % 30
    own = [name for name, _ in model.named_parameters() if "look" not in name]
    plain = copy.deepcopy(model)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    for frozen in (own[:1], own, [], own[1:]):
        for each in (model, plain):
            for name, p in each.named_parameters():
                p.requires_grad_(name not in frozen)
        norms, sums = by_loop(plain, ids, plain_losses, max_grad_norm=1.0)
        model.zero_grad()
        torch.testing.assert_close(clipper.backward(plain_losses(model, ids)), norms, rtol=1e-9, atol=1e-12)
        for name, p in model.named_parameters():
            if name not in frozen:
                torch.testing.assert_close(p.grad, sums[name], rtol=1e-9, atol=1e-12)


@settings(max_examples=8, deadline=None)
@given(batch=st.integers(1, 5), length=st.integers(1, 5), data=st.data())
def test_tokens_in_any_masked_positions_are_exact(batch, length, data):
    numbers = st.lists(st.integers(0, 29), min_size=length, max_size=length)
    ids = torch.tensor(data.draw(st.lists(numbers, min_size=batch, max_size=batch)))
    for model in (SetItem, Where):
        assert_exact_alone(model(rows=30).double(), ids)


@settings(max_examples=8, deadline=None)
@given(batch=st.integers(1, 5), length=st.integers(1, 6))
def test_tokens_and_positions_of_any_length_are_exact(batch, length):
    assert_exact_alone(ClassToken(length, rows=30).double(), draw_ids(30, batch, length))


@settings(max_examples=8, deadline=None)
@given(batch=st.integers(1, 4), length=st.integers(1, 6), padding=st.integers(0, 3))
def test_state_spaces_of_any_length_and_padding_are_exact(batch, length, padding):
    ids = F.pad(draw_ids(30, batch, length), (0, padding))

    def losses(model, ids):
        return model(ids)[:, :length].sin().sum((1, 2))

    assert_exact_alone(Mamba(rows=30).double(), ids, losses)
