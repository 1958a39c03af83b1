"""For every operator with a rule: small uses of it by parameters and examples, in both orders where both exist."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

BATCH, LENGTH, WIDTH = 3, 4, 5


class Use(nn.Module):
    """Examples (B, T, d) through a linear layer, and `call(h, *parameters)`, in float64; the seed is fixed."""

    def __init__(self, call, *shapes):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.own = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)
        self.call = call
        self.double()

    def forward(self, x):
        return self.call(self.first(x), *self.own)


def named(name, function):
    """A function that a TorchFunctionMode sees under a name, for names that no version of PyTorch need hand over."""

    def operator(*args):
        if has_torch_function(args):
            return handle_torch_function(operator, args, *args)
        return function(*args)

    operator.__name__ = name
    return operator


def ids(h, count, *, at=0):
    """(B, T): numbers below `count` that depend on the examples."""
    return (h.detach()[..., at].abs() * 100).long() % count


CASES = []
"""(name, what is special, call, shapes)"""


def case(names, call, *shapes, about=""):
    """Register a use under each of the names; `call` gets the function before h and the parameters."""
    for name, function in names.items():
        CASES.append((name, about, lambda *args, f=function: call(f, *args), shapes))


def _torch(text):
    return {name: getattr(torch, name) for name in text.split()}


def _stand_ins(text):
    """Methods of tensors, each under its own name."""
    return {name: named(name, getattr(torch.Tensor, name)) for name in text.split()}


ARITHMETIC = {
    **_torch("add sub subtract mul multiply div divide true_divide rsub maximum minimum fmax fmin fmod remainder"),
    **_torch("atan2 hypot copysign logaddexp logaddexp2"),
    **_stand_ins("__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __rdiv__"),
    **{name: getattr(F, name) for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")},
}


def _unreduced(f, one, other):
    return f(one, other, reduction="none") if f.__name__.endswith("_loss") else f(one, other)


case(ARITHMETIC, lambda f, h, w: _unreduced(f, h, w), (WIDTH,), about="examples first")
case(ARITHMETIC, lambda f, h, w: _unreduced(f, w.expand(h.shape), h), (LENGTH, 1), about="parameter first")
POWERS = {**_torch("pow float_power xlogy"), **_stand_ins("__pow__ __rpow__")}
case(POWERS, lambda f, h, w: f(h.exp(), w.exp()), (LENGTH, 1), about="examples first")
case(POWERS, lambda f, h, w: f(w.exp(), h.exp()), (LENGTH, 1), about="parameter first")
COMPARISONS = {**_torch("eq ne gt ge lt le isclose"), **_stand_ins("__eq__ __ne__ __gt__ __ge__ __lt__ __le__")}
case(COMPARISONS, lambda f, h, w: f(h, w) * h + f(w, h).double() * w, (WIDTH,))
IN_PLACE = {f"{name}_": getattr(torch.Tensor, f"{name}_") for name in ("add", "sub", "mul", "div", "copy")}
case(IN_PLACE, lambda f, h, w: f(h.sin(), w), (WIDTH,), about="examples first")
AUGMENTED = _stand_ins("__iadd__ __isub__ __imul__ __itruediv__")
case(AUGMENTED, lambda f, h, w: f(h.sin(), w), (LENGTH, 1), about="examples first")
CHANGED = {name: each for name, each in {**IN_PLACE, **AUGMENTED}.items() if name != "copy_"}
case(CHANGED, lambda f, h, w: f(w.exp().expand(h.shape).clone(), h), (WIDTH,), about="parameter first")
case({"pow_": torch.Tensor.pow_}, lambda f, h, w: f(h.exp() + 1, w), (WIDTH,))
case(_torch("where"), lambda f, h, w: f(h > 0, w, h), (WIDTH,), about="parameter first")
case(_torch("where"), lambda f, h, w: f(h > 0, h, w), (LENGTH, 1), about="examples first")
case(_torch("lerp"), lambda f, h, w: f(h, w, h.sin()) + f(w, h, w) + f(h, h.sin(), w), (WIDTH,))
case({"lerp_": torch.Tensor.lerp_}, lambda f, h, w: f(h.sin(), w, 0.3), (WIDTH,))
for name in ("addcmul", "addcdiv"):
    case(_torch(name), lambda f, h, w, v: f(h, w, h.exp()) + f(w, v, h.exp(), value=2), (WIDTH,), (LENGTH, 1))
    case({f"{name}_": getattr(torch.Tensor, f"{name}_")}, lambda f, h, w: f(h.sin(), w, h.exp()), (WIDTH,))
case(_torch("masked_fill"), lambda f, h, w: f(h, h > 0, w), (), about="a parameter as the value")
case(_torch("masked_fill"), lambda f, h, w: f(w.expand(h.shape), h > 0, 0.5), (WIDTH,), about="a parameter is filled")
case({"masked_fill_": torch.Tensor.masked_fill_}, lambda f, h, w: f(w.expand(h.shape).clone(), h > 0, 0.5), (WIDTH,))
case(_torch("clamp clip"), lambda f, h, w: f(h, w, w.exp() + 1) + f(w, h), (WIDTH,))
case({"clamp_": torch.Tensor.clamp_}, lambda f, h, w: f(h.sin(), w), (WIDTH,))
case({"threshold": named("threshold", lambda x, w: x.clamp(min=w))}, lambda f, h, w: f(h, w), (WIDTH,))

case(_torch("cat concat concatenate"), lambda f, h, w: f([w.expand(BATCH, -1, -1), h], 1), (1, 2, WIDTH))
case(_torch("stack"), lambda f, h, w: f([h, w.expand(h.shape), h.sin()], 1), (WIDTH,))
case(_torch("gather"), lambda f, h, w: f(w.expand(BATCH, -1), 1, ids(h, 6)), (6,))
case(_torch("take_along_dim"), lambda f, h, w: f(w.expand(BATCH, -1), ids(h, 6), 1), (6,))
case(_torch("index_copy"), lambda f, h, w: f(h, 1, torch.tensor([2, 0]), w.expand(BATCH, -1, -1)), (2, WIDTH))


def _heads(h):
    return h.unsqueeze(1)


ATTENTION = {"scaled_dot_product_attention": F.scaled_dot_product_attention}
case(ATTENTION, lambda f, h, q: f(q, _heads(h), _heads(h)).flatten(1), (1, 1, 2, WIDTH), about="queries")
case(ATTENTION, lambda f, h, k: f(_heads(h), k.expand(BATCH, -1, -1, -1), _heads(h)), (1, LENGTH, WIDTH), about="keys")
case(ATTENTION, lambda f, h, m: f(h, h, h, attn_mask=m), (LENGTH, LENGTH), about="a bias")
case(ATTENTION, lambda f, h, q, m: f(q, h, h, m), (BATCH, 2, WIDTH), (2, LENGTH), about="queries and a bias")


def _written(f, h, w):
    y = h.sin()
    f(y, (slice(None), 0), w)
    f(y, h > 1, w[0])
    return y


case({"__setitem__": torch.Tensor.__setitem__}, _written, (WIDTH,))

for dims, name in enumerate(("conv1d", "conv2d", "conv3d"), 1):
    image = (BATCH, 2, *[2] * dims)
    case(
        {name: getattr(F, name)},
        lambda f, h, w, b, image=image: f(
            h.flatten(1).repeat(1, 2)[:, : torch.Size(image[1:]).numel()].view(image), w, b
        ),
        (4, 2, *[2] * dims),
        (4,),
    )

case({"embedding": F.embedding}, lambda f, h, w: h + f(ids(h, 6), w), (6, WIDTH))
case({"embedding": F.embedding}, lambda f, h, w: h + f(ids(h, 6), w, padding_idx=2), (6, WIDTH), about="padding")
case({"embedding": torch.embedding}, lambda f, h, w: h + f(w, ids(h, 6)), (6, WIDTH), about="of torch")
GET = {"__getitem__": torch.Tensor.__getitem__}
case(GET, lambda f, h, w: h + f(w, ids(h, 6)), (6, WIDTH))
case(GET, lambda f, h, w: h + f(w, ids(h, 6) - 6), (6, WIDTH), about="negative")
case(GET, lambda f, h, w: h + f(w, (ids(h, 2), ids(h, 3, at=1) - 3)), (2, 3, WIDTH), about="two indices")
case(GET, lambda f, h, w: h + f(w, (ids(h, 6), slice(None))), (6, WIDTH), about="before a slice")
case(
    GET,
    lambda f, h, w: h[..., :2].unsqueeze(-2) + f(w, (ids(h, 6), slice(None), slice(2))),
    (6, 2, WIDTH),
    about="before a part",
)
case(GET, lambda f, h, w: h + f(w, (slice(None), ids(h, 6))).movedim(0, -1), (WIDTH, 6), about="after a slice")
case(_torch("index_select"), lambda f, h, w: h + f(w, 1, ids(h, 6)[:, 0]).T.unsqueeze(1), (WIDTH, 6))
case({"embedding_bag": F.embedding_bag}, lambda f, h, w: f(ids(h, 6), w, mode="sum"), (6, WIDTH))

case({"linear": F.linear}, lambda f, h, w, b: f(h, w, b), (6, WIDTH), (6,))
case({"linear": F.linear}, lambda f, h, w: f(w, h[:, 0]).T, (6, WIDTH), about="the examples as the weight")
case({"linear": F.linear}, lambda f, h, w: f(h.transpose(0, 1), w).transpose(0, 1), (6, WIDTH), about="time first")
MATMUL = {"matmul": torch.matmul}
case(MATMUL, lambda f, h, w: f(h, w), (WIDTH, 6), about="examples first")
case(MATMUL, lambda f, h, w: f(w, h), (6, LENGTH), about="parameter first")
case(MATMUL, lambda f, h, w: f(h, w), (WIDTH,), about="a vector")
case(MATMUL, lambda f, h, w: f(w, h), (LENGTH,), about="a vector first")
case(MATMUL, lambda f, h, w: f(h.unsqueeze(1), w), (2, WIDTH, 6), about="a batch of matrices")
case(MATMUL, lambda f, h, w: f(h[:, 0], w).movedim(1, 0), (2, WIDTH, 6), about="rows of the examples, stacked weights")
case(
    MATMUL,
    lambda f, h, w: f(h.transpose(0, 1), w).transpose(0, 1),
    (LENGTH, WIDTH, 6),
    about="time first, stacked weights",
)
case(
    MATMUL,
    lambda f, h, w: f(w, h.movedim(0, -1)).movedim(-1, 0),
    (LENGTH, 6, WIDTH),
    about="stacked weights, columns of the examples",
)
case({"__matmul__": named("__matmul__", torch.matmul)}, lambda f, h, w: f(h, w) + f(w, h.mT).mT, (WIDTH, WIDTH))
case({"__rmatmul__": torch.Tensor.__rmatmul__}, lambda f, h, w: f(w, h) + f(h.mT, w).mT, (WIDTH, WIDTH))
case(_torch("mm"), lambda f, h, w: f(h[:, 0], w) + f(w, h[:, 1].T).T, (WIDTH, WIDTH))
case(_torch("bmm"), lambda f, h, w: f(h, w.expand(BATCH, -1, -1)), (WIDTH, 6), about="examples first")
case(_torch("bmm"), lambda f, h, w: f(w.expand(BATCH, -1, -1), h), (6, LENGTH), about="parameter first")
case(_torch("mv"), lambda f, h, w: f(h[:, 0], w).unsqueeze(1), (WIDTH,), about="examples first")
case(_torch("inner"), lambda f, h, w: f(h, w) + f(w, h).permute(1, 2, 0), (WIDTH, WIDTH))
case(_torch("addmm"), lambda f, h, w, b: f(b, h[:, 0], w, beta=2, alpha=3), (WIDTH, 6), (6,))
case(_torch("baddbmm"), lambda f, h, w, b: f(b, h, w.expand(BATCH, -1, -1)), (WIDTH, 6), (6,))
EINSUM = {"einsum": torch.einsum}
case(EINSUM, lambda f, h, w: f("btd,dhk->bthk", h, w), (WIDTH, 2, 3), about="a linear layer")
case(EINSUM, lambda f, h, w: f("...d,de->...e", h, w), (WIDTH, 3), about="an ellipsis")
case(EINSUM, lambda f, h, w: f("td,btd->btd", w, h), (LENGTH, WIDTH), about="elementwise")
case(EINSUM, lambda f, h, w: f("btd,bsd,d->bts", h, h.sin(), w), (WIDTH,), about="three operands")


def _recurrent(mode, gates):
    weights = (gates * 3, WIDTH), (gates * 3, 3), (gates * 3,), (gates * 3,)

    def call(f, h, *own):
        zeros = h.new_zeros(1, BATCH, 3)
        states = (zeros, zeros) if mode == "lstm" else zeros
        return f(h, states, list(own), True, 1, 0.0, True, False, True)[0]

    case(_torch(mode), call, *weights)


def _cell(mode, gates):
    def call(f, h, *own):
        state = h[:, 1]
        found = f(h[:, 0], (state, state.sin()) if mode == "lstm_cell" else state, *own)
        return torch.cat(found, 1) if isinstance(found, tuple) else found

    case(_torch(mode), call, *[(gates * WIDTH, WIDTH)] * 2, *[(gates * WIDTH,)] * 2)


for mode, gates in (("lstm", 4), ("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1)):
    _recurrent(mode, gates)
    _cell(f"{mode}_cell", gates)

AFFINE = (LENGTH,), (LENGTH,)
case({"layer_norm": F.layer_norm}, lambda f, h, w, b: f(h, (WIDTH,), w, b), (WIDTH,), (WIDTH,))
case({"rms_norm": F.rms_norm}, lambda f, h, w: f(h, (WIDTH,), w), (WIDTH,))
case({"group_norm": F.group_norm}, lambda f, h, w, b: f(h, 2, w, b), *AFFINE)
case({"instance_norm": F.instance_norm}, lambda f, h, w, b: f(h, weight=w, bias=b), *AFFINE)
case({"batch_norm": F.batch_norm}, lambda f, h, w, b: f(h, h.new_zeros(LENGTH), h.new_ones(LENGTH), w, b), *AFFINE)
case(
    {"batch_norm": F.batch_norm},
    lambda f, h, w, b: f(h, h.new_zeros(LENGTH), h.new_ones(LENGTH), w, b, False, 0.1, 1e-5),
    *AFFINE,
    about="by positions",
)
TORCH_NORMS = {
    "batch_norm": lambda *a: torch.batch_norm(
        *a, torch.zeros(4).double(), torch.ones(4).double(), False, 0.1, 1e-5, False
    ),
    "instance_norm": lambda *a: torch.instance_norm(*a, None, None, True, 0.1, 1e-5, False),
}
case(TORCH_NORMS, lambda f, h, w, b: f(h, w, b), *AFFINE, about="of torch")
case({"prelu": F.prelu}, lambda f, h, w: f(h, w), (LENGTH,))
case({"prelu": F.prelu}, lambda f, h, w: f(h, w), (1,), about="one slope")
case({"bilinear": F.bilinear}, lambda f, h, w, b: f(h, h.sin(), w, b), (3, WIDTH, WIDTH), (3,))


def _grouped(x, weight, ends):
    parts = x.tensor_split(ends[:-1])
    return torch.cat([part @ each for part, each in zip(parts, weight, strict=True)])


def _routed(f, h, w):
    rows = h.flatten(0, 1)
    order = ids(h, 5).flatten().argsort()
    return f(rows[order], w, torch.tensor([5, 12]))[order.argsort()].view(BATCH, LENGTH, -1)


case(
    {name: named(name, _grouped) for name in ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")},
    _routed,
    (2, WIDTH, 3),
)
