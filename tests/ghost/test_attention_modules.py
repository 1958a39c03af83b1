"""PyTorch's own attention and Transformer modules."""

import pytest
import torch
from torch import nn

from tests.support.examples_alone import assert_exact_alone, draw, draw_ids, plain_losses
from tests.support.per_example_reference import assert_exact

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]

WIDTH, HEADS = 4, 2
PADDED = 2  # positions at the end of the last example


def fill(module):
    """Change what is initialised to zero or one."""
    with torch.no_grad():
        for number, each in enumerate(module.parameters()):
            generator = torch.Generator(each.device).manual_seed(number)
            each += 0.3 * torch.randn(each.shape, generator=generator, device=each.device)
    return module


def padding_of(batch, length):
    """(B, T): the end of the last example is padding, if it is not alone."""
    mask = torch.zeros(batch, length, dtype=torch.bool)
    mask[-1, length - PADDED :] = batch > 1
    return mask


class Attend(nn.Module):
    """Self-attention or cross-attention between two linear layers."""

    def __init__(self, *, cross=False, options=None, call=None):
        super().__init__()
        torch.manual_seed(6)
        options = dict(options or {})
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.memory = nn.Linear(WIDTH, options.get("kdim", WIDTH)) if cross else None
        self.values = nn.Linear(WIDTH, options["vdim"]) if "vdim" in options else None
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **options)
        self.call = dict(call or {})
        fill(self)

    def forward(self, batch):
        x, mask = batch
        query = self.first(x)
        keys = self.memory(x[:, 1:].sin()) if self.memory is not None else query
        values = self.values(x[:, -keys.shape[1] :].cos()) if self.values is not None else keys
        options = {"key_padding_mask": mask[:, -keys.shape[1] :], **self.call}
        if options.get("attn_mask") == "causal":
            options["attn_mask"] = torch.ones(x.shape[1], keys.shape[1], dtype=torch.bool).triu(1)
        elif options.get("attn_mask") == "additive":
            options["attn_mask"] = draw(x.shape[1], keys.shape[1]).expand(len(x) * HEADS, -1, -1)
        if not self.attention.batch_first:
            query, keys, values = (each.transpose(0, 1) for each in (query, keys, values))
        y, weights = self.attention(query, keys, values, **options)
        if not self.attention.batch_first:
            y = y.transpose(0, 1)
        y = self.head(y)
        if weights is None:
            return y
        spread = weights.square().sum(-1)  # (B, T) or (B, h, T)
        return y + (spread.sum(1) if spread.dim() == 3 else spread)[..., None]


def batch_of(batch, length=4):
    return draw(batch, length, WIDTH), padding_of(batch, length)


ATTENTIONS = {
    "plain": {},
    "no weights": {"call": {"need_weights": False}},
    "weights of each head": {"call": {"average_attn_weights": False}},
    "causal": {"call": {"attn_mask": "causal", "need_weights": False}},
    "additive": {"call": {"attn_mask": "additive", "key_padding_mask": None}},
    "no padding": {"call": {"key_padding_mask": None, "need_weights": False}},
    "no bias": {"options": {"bias": False}},
    "bias of keys": {"options": {"add_bias_kv": True}},
    "zero attention": {"options": {"add_zero_attn": True, "add_bias_kv": True}, "call": {"need_weights": False}},
    "cross": {"cross": True},
    "cross no weights": {"cross": True, "call": {"need_weights": False}},
    "kdim": {"cross": True, "options": {"kdim": 3, "vdim": 5}},
    "kdim no weights": {"cross": True, "options": {"kdim": 3, "vdim": 5}, "call": {"need_weights": False}},
    "kdim bias of keys": {"cross": True, "options": {"kdim": 3, "vdim": 5, "add_bias_kv": True}},
}


def with_order(settings, batch_first):
    return {**settings, "options": {**settings.get("options", {}), "batch_first": batch_first}}


@pytest.mark.parametrize("batch", [1, 4])  # 4: as many examples as positions
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("settings", ATTENTIONS.values(), ids=ATTENTIONS.keys())
def test_multihead_attention_is_exact(settings, batch_first, batch):
    assert_exact_alone(Attend(**with_order(settings, batch_first)).double(), batch_of(batch))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("settings", [{}, {"cross": True}, {"call": {"need_weights": False}}], ids=str)
def test_multihead_attention_in_either_mode_is_exact(settings, training):
    assert_exact_alone(Attend(**with_order(settings, True)).double().train(training), batch_of(3))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("settings", [{}, {"call": {"need_weights": False}}], ids=str)
def test_dropout_in_multihead_attention_is_exact(settings, batch_first):
    model = Attend(**with_order({**settings, "options": {"dropout": 0.4}}, batch_first)).double().train()
    assert_exact(model, batch_of(3), plain_losses)


@pytest.mark.parametrize("frozen", ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj"])
def test_multihead_attention_with_a_frozen_part_is_exact(frozen):
    model = Attend(options={"batch_first": True}).double()
    model.attention.get_submodule("out_proj").requires_grad_(frozen != "out_proj")
    if frozen != "out_proj":
        model.attention.get_parameter(frozen).requires_grad_(False)
    assert_exact_alone(model, batch_of(3))


def test_one_attention_used_twice_is_exact():
    class Twice(Attend):
        def forward(self, batch):
            x, mask = batch
            y = self.attention(self.first(x), x, x, key_padding_mask=mask)[0]
            return self.head(self.attention(y, y, self.first(y), need_weights=False)[0])

    assert_exact_alone(Twice(options={"batch_first": True}).double(), batch_of(3))


def test_attention_at_real_size_is_exact():
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(6)
            self.first, self.attention = nn.Linear(2, 520), nn.MultiheadAttention(520, 4, batch_first=True)

        def forward(self, x):
            x = self.first(x)
            return self.attention(x, x, x, need_weights=False)[0][..., :5]

    model = fill(Large()).double()
    assert sum(p.numel() for p in model.parameters()) > 2**20
    assert_exact_alone(model, draw(2, 3, 2))


class Encode(nn.Module):
    """Ids through an encoder with padding or a causal mask."""

    def __init__(self, *, stack, batch_first, causal=False, **options):
        super().__init__()
        torch.manual_seed(6)
        self.look, self.head = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, 2)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 6, batch_first=batch_first, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH)) if stack else layer
        self.batch_first, self.causal = batch_first, causal
        fill(self)

    def forward(self, batch):
        ids, mask = batch
        x = self.look(ids) if self.batch_first else self.look(ids).transpose(0, 1)
        options = {"src_key_padding_mask": mask}
        if self.causal:
            causal = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device) < 0
            name = "mask" if isinstance(self.encoder, nn.TransformerEncoder) else "src_mask"
            options = {name: causal, "is_causal": True}
        y = self.encoder(x, **options)
        y = self.head(y if self.batch_first else y.transpose(0, 1))
        if self.causal:
            return y
        return torch.nn.functional.pad(y, (0, 0, 0, ids.shape[1] - y.shape[1])) * ~mask[..., None]


def texts(batch, length=4):
    return draw_ids(9, batch, length), padding_of(batch, length)


@pytest.mark.parametrize("training", [True, False])  # in eval mode PyTorch has a fused path
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("stack", [True, False])
def test_transformer_encoders_are_exact(stack, batch_first, norm_first, training):
    options = {"dropout": 0.0, "norm_first": norm_first, "activation": "gelu" if norm_first else "relu"}
    model = Encode(stack=stack, batch_first=batch_first, **options).double().train(training)
    assert_exact_alone(model, texts(4))
    assert_exact_alone(model, texts(1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stack", [True, False])
def test_causal_transformer_encoders_are_exact(stack, training):
    model = Encode(stack=stack, batch_first=True, causal=True, dropout=0.0, bias=False).double().train(training)
    assert_exact_alone(model, texts(3))


@pytest.mark.parametrize("stack", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_dropout_in_transformer_encoders_is_exact(batch_first, stack):
    assert_exact(Encode(stack=stack, batch_first=batch_first, dropout=0.3).double().train(), texts(3), plain_losses)


@pytest.mark.parametrize("part", ["look", "encoder.self_attn", "encoder.linear1", "encoder.norm2"])
@pytest.mark.parametrize("training", [True, False])
def test_a_transformer_layer_with_a_frozen_part_is_exact(part, training):
    model = Encode(stack=False, batch_first=True, dropout=0.0).double().train(training)
    model.get_submodule(part).requires_grad_(False)
    assert_exact_alone(model, texts(3))


@pytest.mark.parametrize("stack", [True, False])
def test_a_head_above_a_frozen_encoder_is_exact(stack):
    """PyTorch takes its fused path, because nothing in the encoder needs a gradient."""
    model = Encode(stack=stack, batch_first=True).double().eval()
    model.look.requires_grad_(False)
    model.encoder.requires_grad_(False)
    assert_exact_alone(model, texts(3))


class Decode(nn.Module):
    """Ids through a decoder, or an encoder and a decoder, with padding of the source and a causal mask."""

    def __init__(self, kind, *, batch_first, **options):
        super().__init__()
        torch.manual_seed(6)
        self.look, self.head = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, 9, bias=False)
        self.head.weight = self.look.weight
        common = {"dim_feedforward": 6, "batch_first": batch_first, **options}
        if kind == "transformer":
            self.core = nn.Transformer(WIDTH, HEADS, 1, 1, **common)
        else:
            layer = nn.TransformerDecoderLayer(WIDTH, HEADS, **common)
            self.core = layer if kind == "layer" else nn.TransformerDecoder(layer, 2)
        self.batch_first, self.kind = batch_first, kind
        fill(self)

    def forward(self, batch):
        ids, mask = batch
        source, target = self.look(ids), self.look(ids[:, :3])
        if not self.batch_first:
            source, target = source.transpose(0, 1), target.transpose(0, 1)
        causal = torch.ones(3, 3, dtype=torch.bool).triu(1)
        if self.kind == "transformer":
            masks = {"src_key_padding_mask": mask, "memory_key_padding_mask": mask, "tgt_mask": causal}
            y = self.core(source, target, **masks)
        else:
            y = self.core(target, source, tgt_mask=causal, memory_key_padding_mask=mask)
        return self.head(y if self.batch_first else y.transpose(0, 1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["layer", "decoder", "transformer"])
def test_transformer_decoders_are_exact(kind, batch_first, norm_first, training):
    model = Decode(kind, batch_first=batch_first, dropout=0.0, norm_first=norm_first).double().train(training)
    assert_exact_alone(model, texts(3))


@pytest.mark.parametrize("kind", ["layer", "decoder", "transformer"])
def test_dropout_in_transformer_decoders_is_exact(kind):
    assert_exact(Decode(kind, batch_first=True, dropout=0.3).double().train(), texts(3), plain_losses)
