"""Every module class of `torch.nn` with parameters: exact, or refused with an error of memsave."""

import inspect

import pytest
import torch
from torch import nn

from memsave.ghost import GhostClipper
from tests.support.examples_alone import (
    assert_exact_alone,
    assert_exact_or_refused,
    assert_independent,
    draw,
    draw_ids,
    plain_losses,
    raised_by_memsave,
)

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
]


class Wrap(nn.Module):
    """A module after another layer on its first input; the losses use its output."""

    def __init__(self, layer, width, arguments, *, time_first=False):
        super().__init__()
        self.before = nn.Linear(width, width) if width else None
        self.layer, self.arguments, self.time_first = layer, arguments, time_first

    def forward(self, x):
        y = x if self.before is None else self.before(x)
        y = y.transpose(0, 1) if self.time_first else y
        y = self.layer(*self.arguments(y))
        y = y[0] if isinstance(y, tuple) else y
        return y.transpose(0, 1) if self.time_first else y


def one(x):
    return (x,)


def two(x):
    return x, x.sin()


def three(x):
    return x, x.sin(), x.cos()


def tokens(shape):
    """Ids instead of numbers."""
    return lambda: draw_ids(7, *shape)


def made(kind, *arguments, **options):
    """A module class with its arguments, made inside a test for its device."""
    return kind, arguments, options


EXACT = [  # (module, shape of the input, arguments of the call)
    (made(nn.Linear, 4, 3), (3, 5, 4), one),
    (made(nn.Linear, 4, 3, bias=False), (3, 4), one),
    (made(nn.LazyLinear, 3), (3, 5, 4), one),
    (made(nn.Bilinear, 4, 4, 3), (3, 5, 4), two),
    (made(nn.Bilinear, 4, 4, 3, bias=False), (3, 4), two),
    (made(nn.Identity), (3, 4), one),
    (made(nn.Conv1d, 4, 6, 3, padding=1), (3, 4, 5), one),
    (made(nn.Conv1d, 4, 6, 2, padding="same", padding_mode="circular"), (3, 4, 5), one),
    (made(nn.Conv1d, 4, 4, 3, groups=4, dilation=2, bias=False), (3, 4, 6), one),
    (made(nn.Conv2d, 4, 6, 3, stride=2, groups=2), (3, 4, 5, 5), one),
    (made(nn.Conv2d, 4, 6, (1, 3), padding=(0, 1), padding_mode="reflect"), (3, 4, 5, 5), one),
    (made(nn.Conv3d, 2, 4, 2, padding=1), (3, 2, 3, 3, 3), one),
    (made(nn.LazyConv1d, 6, 3), (3, 4, 5), one),
    (made(nn.LazyConv2d, 6, 3), (3, 4, 5, 5), one),
    (made(nn.LazyConv3d, 3, 2), (3, 2, 3, 3, 3), one),
    (made(nn.ConvTranspose1d, 4, 6, 3, stride=2, output_padding=1), (3, 4, 5), one),
    (made(nn.ConvTranspose2d, 4, 6, 3, groups=2, padding=1), (3, 4, 5, 5), one),
    (made(nn.ConvTranspose3d, 2, 4, 2, bias=False), (3, 2, 3, 3, 3), one),
    (made(nn.LazyConvTranspose1d, 6, 3), (3, 4, 5), one),
    (made(nn.LazyConvTranspose2d, 6, 3), (3, 4, 5, 5), one),
    (made(nn.LazyConvTranspose3d, 3, 2), (3, 2, 3, 3, 3), one),
    (made(nn.LayerNorm, 4), (3, 5, 4), one),
    (made(nn.LayerNorm, (5, 4), bias=False), (3, 5, 4), one),
    (made(nn.RMSNorm, 4), (3, 5, 4), one),
    (made(nn.RMSNorm, (5, 4)), (3, 5, 4), one),
    (made(nn.GroupNorm, 2, 4), (3, 4, 5), one),
    (made(nn.GroupNorm, 1, 4), (3, 4), one),
    (made(nn.InstanceNorm1d, 4, affine=True), (3, 4, 5), one),
    (made(nn.InstanceNorm2d, 4, affine=True), (3, 4, 5, 5), one),
    (made(nn.InstanceNorm3d, 2, affine=True), (3, 2, 3, 3, 3), one),
    (made(nn.LazyInstanceNorm1d, affine=True), (3, 4, 5), one),
    (made(nn.LazyInstanceNorm2d, affine=True), (3, 4, 5, 5), one),
    (made(nn.LazyInstanceNorm3d, affine=True), (3, 2, 3, 3, 3), one),
    (made(nn.PReLU), (3, 5, 4), one),
    (made(nn.PReLU, 5), (3, 5, 4), one),
    (made(nn.Embedding, 7, 4), tokens((3, 5)), one),
    (made(nn.Embedding, 7, 4, padding_idx=2), tokens((3,)), one),
    (made(nn.EmbeddingBag, 7, 4), tokens((3, 5)), one),
    (made(nn.EmbeddingBag, 7, 4, mode="sum", padding_idx=1), tokens((3, 5)), one),
    (made(nn.EmbeddingBag, 7, 4, mode="max"), tokens((3, 5)), one),
    (made(nn.RNN, 4, 3, batch_first=True), (3, 5, 4), one),
    (made(nn.RNN, 4, 3, nonlinearity="relu", bidirectional=True, batch_first=True), (3, 5, 4), one),
    (made(nn.LSTM, 4, 3, 2, batch_first=True), (3, 5, 4), one),
    (made(nn.LSTM, 4, 3, proj_size=2, batch_first=True), (3, 5, 4), one),
    (made(nn.GRU, 4, 3, batch_first=True), (3, 5, 4), one),
    (made(nn.RNNCell, 4, 3), (3, 4), one),
    (made(nn.LSTMCell, 4, 3), (3, 4), one),
    (made(nn.GRUCell, 4, 3), (3, 4), one),
    (made(nn.GRUCell, 4, 4), (3, 4), two),
    (made(nn.MultiheadAttention, 4, 2, batch_first=True), (3, 5, 4), three),
    (made(nn.MultiheadAttention, 4, 1, batch_first=True, add_bias_kv=True), (3, 5, 4), three),
    (made(nn.TransformerEncoderLayer, 4, 2, 6, 0.0, batch_first=True), (3, 5, 4), one),
    (made(nn.TransformerDecoderLayer, 4, 2, 6, 0.0, batch_first=True), (3, 5, 4), two),
    (made(nn.Transformer, 4, 2, 1, 1, 6, 0.0, batch_first=True), (3, 5, 4), two),
    (made(nn.BatchNorm1d, 4), (3, 4, 5), one),  # in eval mode, like all of these
    (made(nn.BatchNorm2d, 4), (3, 4, 5, 5), one),
    (made(nn.BatchNorm3d, 2), (3, 2, 3, 3, 3), one),
]
TIME_FIRST = [
    (made(nn.RNN, 4, 3), (3, 5, 4), one),
    (made(nn.LSTM, 4, 3, bidirectional=True), (3, 5, 4), one),
    (made(nn.GRU, 4, 3, 2), (5, 5, 4), one),
    (made(nn.MultiheadAttention, 4, 2), (3, 5, 4), three),
    (made(nn.TransformerEncoderLayer, 4, 2, 6, 0.0), (3, 5, 4), one),
    (made(nn.TransformerDecoderLayer, 4, 2, 6, 0.0), (3, 5, 4), two),
    (made(nn.Transformer, 4, 2, 1, 1, 6, 0.0), (3, 5, 4), two),
    (made(nn.Linear, 4, 3), (3, 5, 4), one),
    (made(nn.LayerNorm, 4), (5, 5, 4), one),
]
CONTAINERS_AND_OTHERS = {  # they have no forward, need targets, or are tested elsewhere
    *("Module", "Container", "Sequential", "ModuleList", "ModuleDict", "ParameterList", "ParameterDict"),
    *("RNNBase", "RNNCellBase", "TransformerEncoder", "TransformerDecoder", "AdaptiveLogSoftmaxWithLoss"),
    "LinearCrossEntropyLoss",
    *("SyncBatchNorm", "LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d"),
}


def describe(case):
    (kind, arguments, options), shape, _ = case
    words = [*map(str, arguments), *(f"{key}={value}" for key, value in options.items())]
    return f"{kind.__name__}({', '.join(words)})-{shape if isinstance(shape, tuple) else 'ids'}"


def build(case, *, time_first=False):
    """(model, batch) of a case, with parameters that are not zero or one."""
    (kind, arguments, options), shape, call = case
    torch.manual_seed(9)
    x = shape() if callable(shape) else draw(*shape)
    model = Wrap(kind(*arguments, **options), 0 if callable(shape) else x.shape[-1], call, time_first=time_first)
    model.double()
    with torch.no_grad():
        model(x)  # lazy modules get their shapes
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model, x


@pytest.fixture
def without_cudnn(device):
    """cuDNN differentiates recurrent layers in train mode alone."""
    with torch.backends.cudnn.flags(enabled=False):
        yield


@pytest.mark.parametrize("case", EXACT, ids=describe)
@pytest.mark.usefixtures("without_cudnn")
def test_modules_are_exact_or_refused(case):
    model, x = build(case)
    model.eval()
    assert_independent(model, x, plain_losses)
    for part in (x, x[:1]):
        assert_exact_or_refused(model, part)
    if model.before is not None and any(True for _ in model.layer.parameters()):
        model.before.requires_grad_(False)  # no gradient of the module's input
        assert_exact_or_refused(model, x)


@pytest.mark.parametrize("case", TIME_FIRST, ids=describe)
@pytest.mark.usefixtures("without_cudnn")
def test_modules_with_time_first_are_exact_or_refused(case):
    model, x = build(case, time_first=True)
    assert_independent(model.eval(), x, plain_losses)
    assert_exact_or_refused(model, x)


@pytest.mark.parametrize("case", [case for case in EXACT if "BatchNorm" not in case[0][0].__name__], ids=describe)
def test_modules_in_train_mode_are_exact_or_refused(case):
    model, x = build(case)
    assert_exact_or_refused(model.train(), x)


def test_every_module_class_with_parameters_is_in_the_table():
    found = {case[0][0].__name__ for case in EXACT}
    missing = []
    for name in dir(nn):
        kind = getattr(nn, name)
        if not (inspect.isclass(kind) and issubclass(kind, nn.Module)) or name in found | CONTAINERS_AND_OTHERS:
            continue
        required = [
            each
            for each in list(inspect.signature(kind.__init__).parameters.values())[1:]
            if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
        ]
        module = None
        for value in (1, 2, (1,), (1, 1)):
            try:
                module = kind(*[value] * len(required))
                break
            except (TypeError, ValueError, AssertionError, AttributeError):
                continue
        if module is not None and any(True for _ in module.parameters()):
            missing.append(name)
    assert len(found) >= 35
    assert not missing


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_batch_norms_in_train_mode_are_refused(kind):
    model = nn.Sequential(kind(2)).double()
    with pytest.raises(ValueError, match="makes every example's gradient depend on the others"):
        GhostClipper(model, max_grad_norm=1.0)


@pytest.mark.parametrize("kind", [nn.LazyLinear, nn.LazyConv1d])
def test_modules_without_shapes_are_refused(kind):
    model = nn.Sequential(kind(3, *([2] if kind is nn.LazyConv1d else []))).double()
    with pytest.raises(ValueError, match="has no shape yet"):
        GhostClipper(model, max_grad_norm=1.0)


def test_an_adaptive_softmax_is_exact_or_refused():
    """Its clusters see the targets of all examples that belong to them."""

    class Adaptive(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(9)
            self.first, self.head = nn.Linear(4, 4), nn.AdaptiveLogSoftmaxWithLoss(4, 9, [3, 6], div_value=2.0)

        def forward(self, batch):
            x, targets = batch
            return -self.head(self.first(x).flatten(0, 1), targets.flatten()).output.view(targets.shape)

    model, batch = Adaptive().double(), (draw(4, 3, 4), draw_ids(9, 4, 3))
    assert_independent(model, batch, plain_losses)
    assert_exact_or_refused(model, batch)


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="a module of later versions of PyTorch")
@pytest.mark.parametrize("bias", [True, False])
def test_a_head_with_its_losses_is_exact_or_refused(bias):
    """It uses the weight of a child that it never calls."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(9)
            self.first, self.head = nn.Linear(4, 4), nn.LinearCrossEntropyLoss(4, 9, bias=bias, reduction="none")

        def forward(self, batch):
            x, targets = batch
            return self.head(self.first(x).flatten(0, 1), targets.flatten()).view(targets.shape)

    model, batch = Head().double(), (draw(4, 3, 4), draw_ids(9, 4, 3))
    assert_independent(model, batch, plain_losses)
    assert_exact_or_refused(model, batch)


@pytest.mark.parametrize("stack", [nn.TransformerEncoder, nn.TransformerDecoder])
def test_stacks_of_transformer_layers_are_exact_or_refused(stack):
    layer = nn.TransformerEncoderLayer if stack is nn.TransformerEncoder else nn.TransformerDecoderLayer
    torch.manual_seed(9)
    layers = stack(layer(4, 2, 6, 0.0, batch_first=True), 2, nn.LayerNorm(4))
    model = Wrap(layers, 4, one if stack is nn.TransformerEncoder else two).double()
    assert_independent(model, draw(3, 5, 4), plain_losses)
    assert_exact_or_refused(model, draw(3, 5, 4))


def test_bags_with_offsets_are_exact_or_refused():
    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(9)
            self.bag, self.head = nn.EmbeddingBag(7, 4, mode="sum", include_last_offset=True), nn.Linear(4, 2)

        def forward(self, batch):
            ids, lengths = batch
            kept = ids[torch.arange(ids.shape[1]) < lengths[:, None]]
            return self.head(self.bag(kept, nn.functional.pad(lengths.cumsum(0), (1, 0)))).tanh()

    batch = draw_ids(7, 3, 4), torch.tensor([4, 1, 2])
    assert_independent(Bags().double(), batch, plain_losses)
    assert_exact_or_refused(Bags().double(), batch)


BETWEEN = {  # (modules, shape of the input)
    "flatten": (
        lambda: [nn.Linear(4, 6), nn.Flatten(), nn.Unflatten(1, (5, 6)), nn.LocalResponseNorm(2), nn.Linear(6, 2)],
        (3, 5, 4),
    ),
    "pixels": (
        lambda: [nn.Conv2d(1, 4, 1), nn.PixelShuffle(2), nn.ZeroPad2d(1), nn.PixelUnshuffle(2), nn.Conv2d(4, 2, 1)],
        (3, 1, 3, 3),
    ),
    "pools": (
        lambda: [nn.Conv2d(3, 4, 1), nn.ChannelShuffle(2), nn.MaxPool2d(2), nn.Upsample(scale_factor=2), nn.PReLU(4)],
        (3, 3, 4, 4),
    ),
    "fold": (
        lambda: [nn.Conv2d(3, 4, 1), nn.Unfold(2), nn.Fold((5, 4), 2), nn.GroupNorm(2, 4), nn.GLU(1)],
        (3, 3, 5, 4),
    ),
    "adaptive": (
        lambda: [nn.Conv1d(3, 4, 1), nn.AdaptiveAvgPool1d(2), nn.Softmax(1), nn.AvgPool1d(2), nn.Conv1d(4, 2, 1)],
        (3, 3, 5),
    ),
}


@pytest.mark.parametrize("case", BETWEEN.values(), ids=BETWEEN.keys())
def test_modules_without_parameters_between_layers_are_exact(case):
    make, shape = case
    torch.manual_seed(9)
    assert_exact_alone(nn.Sequential(*make()).double(), draw(*shape))


@pytest.mark.parametrize("passes", [1, 2])
def test_sparse_and_renormalised_embeddings_are_refused(passes):
    for options in ({"sparse": True}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}):
        for kind in (nn.Embedding, nn.EmbeddingBag):
            model = Wrap(kind(7, 4, **options), 0, one).double()
            with pytest.raises(ValueError) as refusal:
                clipper = GhostClipper(model, max_grad_norm=1.0, passes=passes)
                clipper.backward(plain_losses(model, draw_ids(7, 3, 5)))
            assert raised_by_memsave(refusal.value), refusal.value
