"""Rows of residual blocks in a finished model, made reversible in place.

    model = ViTForImageClassification.from_pretrained(...)
    print(make_reversible(model, pixel_values=images))       # what was converted, what was not, and why

The model runs once. A *row* is blocks of one class that run one after another, each on the output of the one before,
with the same other arguments. The first block of a row then runs the whole row as a `ReversibleSequence` by the
midpoint rule of `from_residual`, and the others pass their input on. Modules, parameters and their names stay as they
are, so that optimizers, adapters and saved weights fit.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from memsave.reversible.coupling import AdditiveCoupling
from memsave.reversible.residual import ResidualBranch, ZeroBranch
from memsave.reversible.sequence import ReversibleSequence
from memsave.reversible.verify import InversionReport, verify

PASSED_ON = ("View", "Reshape", "Permute", "Transpose", "Clone", "ToCopy", "Alias", "Squeeze", "Unsqueeze", "Dropout")
SHAPED = ("Norm", "Relu", "Gelu", "Silu", "LeakyRelu", "Hardtanh", "Elu", "Prelu", "Mul", "RMS")
"""Parts of the names of autograd nodes through which the input of a residual block may reach its output."""


def make_reversible(
    model: nn.Module, *args: Any, anchor_every: int | None = None, grid: float | None = None, **kwargs: Any
) -> "Conversion":
    """Convert every row of residual blocks of the model in place; returns what was converted, and what was not.

    **The function changes:** a row computes the midpoint rule of the same residuals, which equals the blocks in a row
    to first order in what each adds. Train the model, or fine-tune it from its weights. `Conversion.undo` restores it.

    Blocks that keep the shape of their input are residual if the input reaches the output by additions, norms and
    activations alone. A row needs two of them.

    Args:
        model: any model; `args` and `kwargs` are the inputs of one forward, as in training. Its class does not matter.
        anchor_every, grid: those of `ReversibleSequence`.

    Raises ValueError for a model that was converted already.
    """

    def run() -> None:
        with torch.no_grad():
            model(*args, **kwargs)

    return convert(model, run, anchor_every=anchor_every, grid=grid)


def convert(model: nn.Module, run: Callable[[], Any], *, anchor_every: int | None, grid: float | None) -> "Conversion":
    """`make_reversible`, for a function that runs the model once."""
    if any(isinstance(getattr(vars(each).get("forward"), "__self__", None), Place) for each in model.modules()):
        raise ValueError("the model has reversible rows already; call undo() of its Conversion first")
    conversion, inside = Conversion(model), set[nn.Module]()
    for chain in find_rows(model, run):
        if chain[0].block in inside:
            continue  # part of a block that is converted as a whole
        reason = why_not_rebuilt(chain)
        if reason is not None:
            conversion.left.append((_span([call.name for call in chain]), reason))
        elif all(map(_is_residual, chain)):
            row = Row(chain, anchor_every=anchor_every, grid=grid)
            row.attach()
            conversion.rows.append(row)
            inside.update(row.modules())
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    conversion.rows.sort(key=lambda row: order[row.names[0]])
    return conversion


@dataclass
class Conversion:
    """The result of `make_reversible`; `print` it."""

    model: nn.Module
    rows: list["Row"] = field(default_factory=list)
    """The rows that are reversible now."""
    left: list[tuple[str, str]] = field(default_factory=list)
    """(names, the reason) of rows that were not converted."""

    def __str__(self) -> str:
        lines = [
            f"{_span(row.names)}: {len(row.names)} blocks of {type(row.blocks[0]).__name__} are reversible, by the "
            f"midpoint rule, which changes the function"
            for row in self.rows
        ]
        lines += [f"{name}: not converted, because {reason}" for name, reason in self.left]
        return "\n".join(lines or ["the model has no row of residual blocks"])

    def recompute(self, on: bool) -> None:
        """Whether the rows rebuild their activations (True, the default), or store them: the same function."""
        for row in self.rows:
            row.recompute = on

    def verify(self, *args: Any, **kwargs: Any) -> InversionReport:
        """`memsave.reversible.verify` of each row on what it gets in a forward with these inputs; the worst report."""
        seen: list[tuple[Row, Tensor, Any]] = []
        with _recorded(self.rows, seen), torch.no_grad():
            self.model(*args, **kwargs)
        if not seen:
            raise ValueError("no row of the model is reversible, or none ran: nothing to verify")
        reports = [verify(_Twice(row.sequence(bound)), x) for row, x, bound in seen]
        return max(reports, key=lambda report: (not report.ok, report.gradient))

    def undo(self) -> None:
        """Restore the function of the model."""
        for row in self.rows:
            row.detach()
        self.rows = []


class Row:
    """Blocks that run as one `ReversibleSequence`."""

    def __init__(self, calls: list["Call"], *, anchor_every: int | None, grid: float | None):
        self.names, self.blocks = [call.name for call in calls], [call.block for call in calls]
        self.rest = calls[0].rest
        """What each block returns after its output; None if it returns the output alone."""
        self.recompute = True
        self.options: dict[str, Any] = {"anchor_every": anchor_every, "grid": grid}
        self.originals: list[Any] = []
        self.output: Any = None
        """What the first block returned; the others must get it."""
        self.given: Any = None
        self.record: list[tuple[Row, Tensor, Any]] | None = None

    def modules(self) -> Iterator[nn.Module]:
        """The blocks and their submodules."""
        for block in self.blocks:
            yield from block.modules()

    def attach(self) -> None:
        """Replace the forwards of the blocks."""
        self.originals = [vars(block).get("forward") for block in self.blocks]
        for number, block in enumerate(self.blocks):
            block.forward = Place(self, number).forward

    def detach(self) -> None:
        """Restore the forwards of the blocks."""
        for block, original in zip(self.blocks, self.originals, strict=True):
            del block.forward
            if original is not None:
                block.forward = original

    def sequence(self, bound: tuple[tuple[Any, ...], dict[str, Any]]) -> ReversibleSequence:
        """The sequence of one forward, whose blocks get these other arguments."""
        branches: list[nn.Module] = [
            ResidualBranch(Bound(block, original, bound), number=number)
            for number, (block, original) in enumerate(zip(self.blocks, self.originals, strict=True))
        ]
        if len(branches) % 2:
            branches.append(ZeroBranch())
        pairs = zip(branches[::2], branches[1::2], strict=True)
        couplings = [AdditiveCoupling(f, g) for f, g in pairs]
        return ReversibleSequence(couplings, recompute=self.recompute, **self.options)

    def run(self, x: Tensor, bound: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
        """The output of the whole row."""
        for value in tree_leaves(bound):
            if not _is_plain(value):
                raise ValueError(
                    f"{self.names[0]} got a {type(value).__name__}, which it would change again when its activations "
                    f"are rebuilt; call the model without it (of transformers: use_cache=False)"
                )
        if self.record is not None:
            self.record.append((self, x.detach(), bound))
        one, other = self.sequence(bound)(torch.cat((x, x), dim=1)).chunk(2, dim=1)
        self.output, self.given = (one + other) / 2, bound
        return self.output

    def returned(self, x: Tensor) -> Any:
        """The output as a block returns it."""
        return x if self.rest is None else (x, *self.rest)


class Place:
    """The forward of one block of a row; its copy by `deepcopy` belongs to the copied row."""

    def __init__(self, row: Row, number: int):
        self.row, self.number = row, number

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the row at its first block; pass its output on at the others."""
        row = self.row
        if self.number == 0:
            return row.returned(row.run(x, (args, kwargs)))
        if x is not row.output:
            raise RuntimeError(
                f"{row.names[self.number]} did not get the output of {row.names[0]}, although both are blocks of one "
                f"reversible row; convert the model again, with inputs as in training"
            )
        if not _same((args, kwargs), row.given):
            raise RuntimeError(
                f"{row.names[self.number]} got other arguments than {row.names[0]}, although both are blocks of one "
                f"reversible row; convert the model again, with inputs as in training"
            )
        if self.number == len(row.blocks) - 1:
            row.output = row.given = None
        return row.returned(x)


class Bound(nn.Module):
    """A block with the other arguments of one forward of the model."""

    def __init__(self, block: nn.Module, original: Any, bound: tuple[tuple[Any, ...], dict[str, Any]]):
        super().__init__()
        self.block = block
        self._original = original
        self._bound = bound

    def forward(self, x: Tensor) -> Any:
        """The block's own forward."""
        args, kwargs = self._bound
        own = partial(type(self.block).forward, self.block) if self._original is None else self._original
        output = own(x, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


class _Twice(nn.Module):
    """A sequence on two copies of its input."""

    def __init__(self, sequence: ReversibleSequence):
        super().__init__()
        self.sequence = sequence

    def forward(self, x: Tensor) -> Tensor:
        return self.sequence(torch.cat((x, x), dim=1))


# ---- discovery ----


@dataclass(eq=False)
class Call:
    """One call of a module in the forward of a model."""

    name: str
    block: nn.Module
    x: Any
    """Its first argument."""
    bound: tuple[tuple[Any, ...], dict[str, Any]]
    """Its other arguments."""
    depth: int
    """How many calls it is nested in."""
    output: Any = None
    rest: tuple[Any, ...] | None = None
    """Further outputs; None if it returns no tuple."""
    times: int = 1
    """How often the module is called in the forward."""

    @property
    def keeps_shape(self) -> bool:
        """Whether it maps a tensor to one of the same shape."""
        tensors = isinstance(self.x, Tensor) and isinstance(self.output, Tensor)
        return tensors and self.x.shape == self.output.shape


def find_rows(model: nn.Module, run: Callable[[], Any]) -> list[list[Call]]:
    """Rows of two or more blocks of one class that keep the shape of their input, the outermost first.

    Each block of a row gets the output of the one before, and the same other arguments. A block has children, and runs
    in `run()`, which runs the model once.
    """
    calls = _calls(model, run)
    rows = []
    for depth in sorted({call.depth for call in calls}):
        candidates = [call for call in calls if call.depth == depth and call.keeps_shape]
        of_input = {id(call.x): call for call in reversed(candidates)}
        waiting = list(candidates)
        while waiting:
            row = [waiting.pop(0)]
            while True:
                after = of_input.get(id(row[-1].output))
                if after is None or after not in waiting or not _continues(row, after):
                    break
                waiting.remove(after)
                row.append(after)
            if len(row) > 1:
                rows.append(row)
    return rows


def _continues(row: list[Call], after: Call) -> bool:
    first = row[0]
    return type(after.block) is type(first.block) and after.rest == first.rest and _same(after.bound, first.bound)


def _calls(model: nn.Module, run: Callable[[], Any]) -> list[Call]:
    """The calls of modules with children, in the order in which they begin."""
    calls: list[Call] = []
    stack: list[Call] = []
    count: Counter[nn.Module] = Counter()
    handles = []

    def before(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = args[0] if args else None
        stack.append(Call(name, module, first, (tuple(args[1:]), dict(kwargs)), depth=len(stack)))
        calls.append(stack[-1])
        count[module] += 1

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = stack.pop()
        if isinstance(output, tuple) and output and all(each is None for each in output[1:]):
            output, call.rest = output[0], output[1:]
        call.output = output

    for name, module in model.named_modules():
        if module is not model and any(True for _ in module.children()):
            handles.append(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
            handles.append(module.register_forward_hook(after))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    for call in calls:
        call.times = count[call.block]
    return calls


def why_not_rebuilt(row: list[Call]) -> str | None:
    """Why a second evaluation of the blocks would not be the same; None if nothing speaks against it."""
    if any(call.times > 1 for call in row):
        return "its blocks run several times in one forward, with shared parameters"
    value = next((each for each in tree_leaves(row[0].bound) if not _is_plain(each)), None)
    if value is not None:
        return (
            f"its blocks get a {type(value).__name__}, which they would change again; give inputs without it (of "
            f"transformers: use_cache=False)"
        )
    return None


def _is_residual(call: Call) -> bool:
    """Whether the input reaches the output by additions, norms and activations, and by another way, too."""
    x = call.x.detach().clone().requires_grad_(call.x.is_floating_point())
    if not x.requires_grad:
        return False
    args, kwargs = call.bound
    with torch.enable_grad(), torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        buffers = {name: value.clone() for name, value in call.block.named_buffers()}
        y = call.block(x, *args, **kwargs)
        y = y[0] if isinstance(y, tuple) else y
        with torch.no_grad():
            for name, value in call.block.named_buffers():
                value.copy_(buffers[name])
    todo, seen, added = [y.grad_fn], set(), False
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = type(node).__name__
        if getattr(node, "variable", None) is x:
            return added
        is_sum = name.startswith(("AddBackward", "SubBackward"))
        added |= is_sum
        if is_sum or any(part.lower() in name.lower() for part in (*PASSED_ON, *SHAPED)):
            todo += [after for after, _ in node.next_functions]
    return False


@contextmanager
def _recorded(rows: Iterable[Row], seen: list[tuple[Row, Tensor, Any]]) -> Iterator[None]:
    for row in rows:
        row.record = seen
    try:
        yield
    finally:
        for row in rows:
            row.record = None


def _is_plain(value: Any) -> bool:
    """Whether a block cannot change the value."""
    return value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype, torch.device))


def _same(one: Any, other: Any) -> bool:
    """Whether two sets of arguments are the same tensors and equal numbers."""
    first, second = tree_leaves(one), tree_leaves(other)
    if len(first) != len(second):
        return False
    return all(a is b or (not isinstance(a, Tensor) and _is_plain(a) and a == b) for a, b in zip(first, second))


def _span(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1].rpartition('.')[2]}"
