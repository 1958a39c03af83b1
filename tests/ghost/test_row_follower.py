"""Chains of operators: where the Rows of the result are known, each slice depends on its example alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from memsave.ghost.backward_context import BackwardContext
from memsave.ghost.operator_trace import OperatorTrace
from memsave.ghost.row_changes import after_any_other
from memsave.ghost.rows import Lost, Rows

SMALL = 600  # elements of a tensor to which an operator that enlarges it is applied


def index(random, size, count):
    return torch.tensor([random.randrange(size) for _ in range(count)])


def dim_of(x, random):
    return random.randrange(-x.dim(), x.dim())


def reshape(x, random):
    sizes = list(x.shape)
    at = random.randrange(len(sizes))
    if len(sizes) > 1 and random.random() < 0.6:
        at = min(at, len(sizes) - 2)
        sizes[at : at + 2] = [sizes[at] * sizes[at + 1]]
    else:
        parts = [n for n in range(1, sizes[at] + 1) if sizes[at] % n == 0]
        part = random.choice(parts)
        sizes[at : at + 1] = [part, sizes[at] // part]
    return x.reshape(sizes)


def view(x, random):
    return reshape(x.contiguous(), random).contiguous().view(-1, *x.shape[-1:]) if x.dim() > 1 else x


def windows(x, random):
    """A partition into windows of two in the dimensions 1 and 2, folded into dimension 0."""
    if x.dim() < 3 or x.shape[1] % 2 or x.shape[2] % 2:
        return x
    n, h, w = x.shape[:3]
    parts = x.reshape(n, h // 2, 2, w // 2, 2, *x.shape[3:]).transpose(2, 3)
    return parts.reshape(-1, 4, *x.shape[3:])


def pad(x, random):
    amounts = [random.randrange(2) for _ in range(2 * random.randint(1, x.dim()))]
    mode = random.choice(["constant", "constant", "circular"])
    if mode == "circular" and (x.dim() != 3 or len(amounts) != 2):
        mode = "constant"
    return F.pad(x, amounts, mode)


def masked(x, random):
    mask = torch.tensor([random.random() < 0.7 for _ in range(x.shape[0])])
    return x[mask] if mask.any() else x


def masked_pairs(x, random):
    if x.dim() < 2:
        return x
    mask = torch.tensor([[random.random() < 0.7 for _ in range(x.shape[1])] for _ in range(x.shape[0])])
    return x[mask] if mask.any() else x


def into_zeros(x, random):
    target = x.new_zeros(x.shape[0] + random.randrange(2), *x.shape[1:])
    places = torch.tensor(random.sample(range(len(target)), x.shape[0]))
    how = random.randrange(3)
    if how == 0:
        target[places] = x
    elif how == 1:
        target = target.index_add(0, places, x)
    else:
        target.index_add_(0, places, x)
    return target


def slices_into_zeros(x, random):
    target = x.new_zeros(x.shape)
    for place in random.sample(range(len(x)), len(x)):
        target[place : place + 1] = x[place : place + 1].sin()
    return target


def einsum(x, random):
    letters = "abcdefghijkl"[: x.dim()]
    result = list(letters)
    random.shuffle(result)
    if len(result) > 1 and random.random() < 0.5:
        result = result[1:]
    return torch.einsum(f"{letters}->{''.join(result)}", x)


def einsum_of_two(x, random):
    equation = random.choice(
        ["...d,...d->...", "...d,...d->...d", "...d,de->...e", "ab...,ab...->ba...", "a...,a...->..."]
    )
    if equation.startswith("ab") and x.dim() < 2:
        return x
    if "de" in equation:
        return torch.einsum(equation, x, torch.randn(x.shape[-1], random.randint(1, 3)))
    other = x.new_ones(x.shape[-1:]) if equation.startswith("...") and random.random() < 0.3 else x.sin()
    return torch.einsum(equation, x, other)


def matmul(x, random):
    how = random.randrange(5)
    if how == 0:
        return x @ torch.randn(x.shape[-1], random.randint(1, 3))
    if how == 1:
        return x @ torch.randn(x.shape[-1])
    if x.dim() < 2:
        return x
    if how == 2:
        return torch.randn(2, x.shape[-2]) @ x
    return x @ x.transpose(-1, -2) if how == 3 else torch.inner(torch.randn(2, x.shape[-1]), x)


def reduce(x, random):
    name = random.choice(["sum", "mean", "amax", "std", "logsumexp", "norm", "max", "linalg"])
    dim, keep = dim_of(x, random), random.random() < 0.3
    if name == "norm":
        return x.norm(2, dim, keep)
    if name == "linalg":
        return torch.linalg.vector_norm(x, dim=dim, keepdim=keep)
    if name == "std":
        return x.std(dim, False, keep)
    found = getattr(x, name)(dim, keep)
    return found if isinstance(found, torch.Tensor) else found[0]


def from_a_table(x, random):
    """A constant table at an index of the examples, times the examples' own values."""
    positions = (x.detach() > 0).long()
    table = torch.randn(2, random.choice([1, 2, 3]))
    return table[positions] * x.unsqueeze(-1)


def in_place(x, random):
    y = x.clone()
    how = random.randrange(3)
    if how == 0:
        return y.unsqueeze_(random.randrange(-x.dim() - 1, x.dim() + 1))
    return y.transpose_(dim_of(x, random), dim_of(x, random)) if how == 1 else y.squeeze_()


def join(x, random):
    dim, other = dim_of(x, random), random.choice([x, x.flip(0), torch.ones_like(x), x.new_zeros(x.shape)])
    return torch.stack([other, x], dim) if random.random() < 0.4 else torch.cat([x, other], dim)


def part(x, random):
    dim = dim_of(x, random)
    how = random.randrange(4)
    if how == 0:
        return random.choice(x.chunk(2, dim))
    if how == 1:
        return random.choice(x.unbind(dim))
    if how == 2:
        return x.narrow(dim, 0, max(1, x.shape[dim] - 1))
    return random.choice(x.split([1, x.shape[dim] - 1], dim)) if x.shape[dim] > 1 else x


STEPS = {
    "reshape": reshape,
    "view": view,
    "windows": windows,
    "permute": lambda x, random: x.permute(random.sample(range(x.dim()), x.dim())),
    "permute by name": lambda x, random: torch.permute(input=x, dims=random.sample(range(x.dim()), x.dim())),
    "transpose": lambda x, random: x.transpose(dim_of(x, random), dim_of(x, random)),
    "aten transpose": lambda x, random: torch.ops.aten.transpose.int(x, dim_of(x, random), dim_of(x, random)),
    "T": lambda x, random: x.mT if x.dim() > 1 else x,
    "H": lambda x, random: x.mH if x.dim() > 1 else x,
    "adjoint": lambda x, random: torch.adjoint(x) if x.dim() > 1 else x,
    "roll": lambda x, random: torch.roll(x, random.randrange(3), dim_of(x, random)),
    "roll flat": lambda x, random: torch.roll(x, random.randrange(3)),
    "flip": lambda x, random: x.flip(dim_of(x, random)),
    "flipud": lambda x, random: torch.flipud(x),
    "rot90": lambda x, random: torch.rot90(x, random.randrange(4)) if x.dim() > 1 else x,
    "part": part,
    "join": join,
    "index": lambda x, random: x[index(random, len(x), random.randint(1, 4))],
    "negative index": lambda x, random: x[index(random, len(x), random.randint(1, 4)) - len(x)],
    "index of dimension 1": lambda x, random: x[:, index(random, x.shape[1], 3)] if x.dim() > 1 else x,
    "index of two": lambda x, random: x[index(random, len(x), 3), index(random, x.shape[1], 3)] if x.dim() > 1 else x,
    "list": lambda x, random: x[index(random, len(x), 3).tolist()],
    "array": lambda x, random: x[index(random, len(x), 3).numpy()],
    "index_select": lambda x, random: x.index_select(d := dim_of(x, random), index(random, x.shape[d], 3)),
    "take": lambda x, random: torch.take(x, index(random, x.numel(), 4)),
    "mask": masked,
    "mask of two": masked_pairs,
    "slice": lambda x, random: x[random.randrange(len(x)) :, ..., None],
    "pad": pad,
    "repeat": lambda x, random: x.repeat_interleave(random.randint(1, 2), dim_of(x, random)),
    "repeat by counts": lambda x, random: x.repeat_interleave(index(random, 3, len(x)) + 1, 0),
    "tile": lambda x, random: x.repeat(random.randint(1, 2), *[1] * (x.dim() - 1)),
    "expand": lambda x, random: x.expand(random.choice([2, 3]), *x.shape),
    "unsqueeze": lambda x, random: x.unsqueeze(random.randrange(-x.dim() - 1, x.dim() + 1)),
    "squeeze": lambda x, random: x.squeeze(),
    "unfold": lambda x, random: x.unfold(d := dim_of(x, random), min(2, x.shape[d]), 1),
    "diagonal": lambda x, random: x.diagonal() if x.dim() > 1 else x,
    "into zeros": into_zeros,
    "slices into zeros": slices_into_zeros,
    "reduce": reduce,
    "einsum": einsum,
    "einsum of two": einsum_of_two,
    "matmul": matmul,
    "table": from_a_table,
    "in place": in_place,
    "diag_embed": lambda x, random: torch.diag_embed(x),
    "complex": lambda x, random: torch.view_as_real(torch.complex(x, x.sin())),
    "outer": lambda x, random: x.unsqueeze(-1) * torch.randn(x.shape[-1]),
    "leading": lambda x, random: torch.randn(random.choice([2, 3]), *[1] * x.dim()) * x,
    "normalise": lambda x, random: F.softmax(x, dim_of(x, random)),
    "distance": lambda x, random: F.pairwise_distance(x, x.sin() + 2) if x.dim() > 1 else x,
}


def followed(x, steps, random):
    """(the result of the steps, what is known of it)."""
    trace = OperatorTrace(BackwardContext(torch.zeros(len(x))), {}, {})
    trace.mark_examples(iter([x]))
    with trace:
        for name in steps:
            if x.dim() > 0 and 0 < x.numel() <= SMALL:
                x = STEPS[name](x, random)
        return x, trace.provenance(x)


def assert_rows(x, y, rows):
    """Each slice of y has a gradient in its own example of x alone."""
    examples = range(len(x)) if rows.examples is None else [int(each) for each in rows.examples]
    assert len(examples) == y.shape[rows.dim]
    weights = torch.rand(y.shape) + 0.5
    for part, example in zip((y * weights).unbind(rows.dim), examples, strict=True):
        (grad,) = torch.autograd.grad(part.sum(), x, retain_graph=True, allow_unused=True)
        if grad is not None:
            assert 0 <= example < len(x)
            others = [each for each in range(len(x)) if each != example]
            assert not grad[others].any(), (example, rows)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([(2, 2, 2), (3, 3, 2), (2, 4, 2), (3, 3, 3), (3, 2, 4), (2, 3), (1, 2, 3), (4, 4)]),
    st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_known_rows_are_right(shape, steps, random):
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    y, found = followed(x, steps, random)
    if isinstance(found, Rows) and y.requires_grad:
        assert_rows(x, y, found)


KNOWN = [
    ("time first", (3, 4, 2), lambda x: x.transpose(0, 1), Rows(1)),
    ("folded", (3, 4, 2), lambda x: x.reshape(12, 2), Rows(0, (0,) * 4 + (1,) * 4 + (2,) * 4)),
    ("time folded", (2, 3, 2), lambda x: x.transpose(0, 1).reshape(6, 2), Rows(0, (0, 1, 0, 1, 0, 1))),
    ("windows", (2, 4, 4, 1), lambda x: windows(x, None), Rows(0, (0,) * 4 + (1,) * 4)),
    ("back from windows", (2, 4, 4, 1), lambda x: windows(x, None).reshape(2, 4, 4, 1), Rows(0)),
    ("square transposed", (3, 3), lambda x: x.mH, Rows(1)),
    ("transposed in place", (3, 3), lambda x: x.clone().t_(), Rows(1)),
    ("unsqueezed in place", (3, 3), lambda x: x.clone().unsqueeze_(0), Rows(1)),
    ("aten", (3, 3), lambda x: torch.ops.aten.transpose.int(x, 0, 1), Rows(1)),
    ("by name", (3, 3), lambda x: torch.transpose(input=x, dim0=0, dim1=1), Rows(1)),
    ("a table as long as the batch", (3, 3), lambda x: torch.randn(4, 2)[(x.detach() > 0).long()] * 1, Rows(0)),
    ("complex, square", (3, 3), lambda x: torch.view_as_real(torch.complex(x, x)), Rows(0)),
    ("one example", (1, 3), lambda x: x.transpose(0, 1), Rows(0, (0, 0, 0))),
]


@pytest.mark.parametrize(("name", "shape", "change", "expected"), KNOWN, ids=[each[0] for each in KNOWN])
def test_rows_are_known(name, shape, change, expected):
    x = torch.randn(shape, requires_grad=True)
    trace = OperatorTrace(BackwardContext(torch.zeros(len(x))), {}, {})
    trace.mark_examples(iter([x]))
    with trace:
        found = trace.provenance(change(x))
    assert found == expected


@pytest.mark.parametrize("change", [lambda x: x.sum(0), lambda x: x.sum(), lambda x: x.reshape(9).reshape(1, 9)])
def test_mixed_rows_are_lost(change):
    x = torch.randn(3, 3, requires_grad=True)
    trace = OperatorTrace(BackwardContext(torch.zeros(3)), {}, {})
    trace.mark_examples(iter([x]))
    with trace:
        found = trace.provenance(change(x))
    assert isinstance(found, Lost) or found.dim == 1


def test_the_first_operator_that_lost_the_rows_is_named_by_all_that_follow():
    x = torch.randn(3, 3, requires_grad=True)
    trace = OperatorTrace(BackwardContext(torch.zeros(3)), {}, {})
    trace.mark_examples(iter([x]))
    with trace:
        lost = x.sum(0)
        assert trace.provenance(lost.exp().neg()) == trace.provenance(lost) == Lost("sum")


def test_rows_are_not_known_after_an_operator_that_may_have_summed_over_them():
    assert after_any_other("unknown", torch.empty(3), [(torch.empty(4, 3), Rows(1))]) == Rows(0)
    assert after_any_other("unknown", torch.empty(3), [(torch.empty(3, 3), Rows(1))]) is None


def test_an_operand_that_fits_two_dimensions_leaves_the_rows_to_the_others():
    unclear, clear = (torch.empty(3, 4), Rows(0)), (torch.empty(3, 3, 4), Rows(0))
    assert after_any_other("unknown", torch.empty(3, 3, 4), [unclear]) is None
    assert after_any_other("unknown", torch.empty(3, 3, 4), [unclear, clear]) == Rows(0)


@pytest.mark.parametrize("join", [torch.add, lambda *two: torch.stack(two), lambda *two: torch.cat(two, 1)])
def test_rows_that_depend_on_values_are_lost_where_other_examples_join_them(join):
    x, mask = torch.randn(3, 2, 4, requires_grad=True), torch.ones(3, 2, dtype=torch.bool)
    trace = OperatorTrace(BackwardContext(torch.zeros(3)), {}, {})
    trace.mark_examples(iter([x]))
    with trace:
        y = x[mask]
        same, mixed = join(y, x[mask].sin()), [join(y, y.flip(0)), join(y.flip(0), y)]
        assert isinstance(trace.provenance(same), Rows)
        assert all(isinstance(trace.provenance(each), Lost) for each in mixed)
