"""Any other layer: its own vector-Jacobian product, example by example.

Exact for every layer that treats the examples apart, at the memory of the per-example gradients of its parameters. The
layer runs again in the backward, on one example at a time. What it gives there is compared with what it gave in the
forward, for every example: so a layer that mixes examples, draws random numbers or has changed in between is refused.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from memsave.ghost.gradients import Dense, Gradient, has_values, wide
from memsave.ghost.refusals import Refused
from memsave.ghost.rules import Given, Use

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}  # an example's output alone against that in its batch
LOW_PRECISION = 3e-2  # the same for narrower outputs, and under autocast, where it runs again in float32
GROUPS = 8  # outputs are compared by the sums of every 8th element and of each of 8 parts
UNTOLD = 6  # arguments that may be tables as long as the batch, at most; further ones hold examples

Axes = tuple[int | None, ...]
Found = tuple[dict[str, Tensor], Tensor]

_thread = threading.local()


def generic(layer: nn.Module, given: Given) -> Use:
    """The rule of every layer that has none."""
    if getattr(layer, "sparse", False):
        raise Refused("has sparse gradients, for which there is no rule", "construct it with sparse=False")
    if any(_draws_masks(module) for module in layer.modules()):
        raise Refused(
            "draws dropout masks inside a layer that is differentiated example by example",
            "set that dropout to 0, or move it out of the layer",
        )
    leaves, spec = pytree.tree_flatten((given.args, given.kwargs))
    spots = [spot for spot, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    inputs = tuple(leaves[spot] for spot in spots)
    run = given.forward  # and not `given`, which holds tensors
    plain = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def forward(tensors: Sequence[Tensor]) -> Any:
        """The layer's function of other tensors in the place of its tensor arguments."""
        filled = list(plain)
        for spot, tensor in zip(spots, tensors, strict=True):
            filled[spot] = tensor
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return run(*args, **kwargs)

    tracked = tuple(each.requires_grad for each in inputs)
    autocast = any(torch.is_autocast_enabled(kind) for kind in {each.device.type for each in inputs})
    tolerance = LOW_PRECISION if autocast else 0.0
    again = _Again(layer, given, forward, tracked, tolerance)
    return Use(given.args, given.kwargs, inputs, again.per_example, tolerance, lambda output: (_marks(output),))


def _draws_masks(module: nn.Module) -> bool:
    if isinstance(module, nn.RNNBase):
        return module.training and module.dropout > 0 and module.num_layers > 1
    return isinstance(module, _DropoutNd) and module.training and module.p > 0


class _NotThisReading(Exception):
    """An example alone does not give one row of the output, or what the layer draws is random."""


class _NothingRandom(TorchDispatchMode):
    """Within, an operation that draws random numbers raises; dropout of probability zero draws none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            given = {arg.name: value for arg, value in zip(func._schema.arguments, args, strict=False)}
            given |= kwargs or {}
            probabilities = [given[name] for name in ("p", "dropout_p", "dropout") if name in given]
            defaults = [arg.default_value for arg in func._schema.arguments if arg.name == "dropout_p"]
            if any(probabilities or defaults or [1.0]):
                raise _NotThisReading
        return func(*args, **(kwargs or {}))


class _Again:
    """A layer that runs again, example by example. It keeps no tensor of the forward."""

    def __init__(
        self,
        layer: nn.Module,
        given: Given,
        forward: Callable[[Sequence[Tensor]], Any],
        tracked: tuple[bool, ...],
        tolerance: float,
    ):
        self.layer, self.wanted, self.notes = layer, given.wanted, given.notes
        self.told = f"{given.name} ({given.kind})"
        self.cached = any(type(each).__name__.endswith("Cache") for each in (*given.args, *given.kwargs.values()))
        self.forward, self.tracked, self.tolerance = forward, tracked, tolerance

    def per_example(self, saved: tuple[Tensor, ...], grad: Tensor) -> dict[str, Gradient]:
        """The gradients, under the one reading of the arguments that gives every example its row of the output."""
        *inputs, marks = saved
        key = (len(grad), tuple(each.shape for each in inputs))
        known = self.notes.get(key)
        right: list[Found] = []
        error: Exception | None = None
        for axes in [known] if known is not None else self._readings(inputs, len(grad)):
            try:
                found = self._run(axes, [wide(each) for each in inputs], grad)
            except Exception as problem:
                error = problem
                continue
            if (
                0 not in axes
                and len(grad) > 1
                and has_values(grad)
                and not self._agree(found[1], found[1][:1], grad.dtype)
            ):
                continue  # an output that differs from example to example comes from examples that are not seen here
            if not has_values(grad) or self._agree(found[1], marks, grad.dtype):
                right.append(found)
                last = axes
        if not right:
            self._refuse(error)
        if len(right) == 1:
            self.notes[key] = last
        elif any(not _same(right[0], each) for each in right[1:]):
            raise ValueError(
                f"{self.told} gives the same output whether some argument of "
                f"{len(grad)} rows holds examples or is a table, but not the same gradient; take another batch size, "
                f"or give the table as a buffer"
            )
        values = right[0][0]
        return {name: Dense(torch.view_as_real(v) if v.is_complex() else v) for name, v in values.items()}

    def _readings(self, inputs: Sequence[Tensor], size: int) -> Iterator[Axes]:
        """Which arguments may have the examples in dimension 0: those as long as the batch, if they are no table.

        What a gradient flows to is an activation of examples, and no table.
        """
        long = [bool(each.dim()) and len(each) == size for each in inputs]
        untold = [spot for spot, each in enumerate(inputs) if long[spot] and not self.tracked[spot]][:UNTOLD]
        choices = [((0, None) if spot in untold else (0,)) if long[spot] else (None,) for spot in range(len(inputs))]
        if any(long):
            yield from (axes for axes in product(*choices) if 0 in axes)
        elif not any(self.tracked) and all(size not in each.shape for each in inputs):
            yield (None,) * len(inputs)  # its output does not depend on the examples at all

    def _run(self, axes: Axes, inputs: Sequence[Tensor], grad: Tensor) -> Found:
        """The gradients (B, ...) by name, and the marks (B, K) of the outputs: by vmap, where the layer can do that."""
        rows = torch.eye(len(grad), dtype=torch.bool, device=grad.device)
        tensors, in_dims = (rows, grad, *inputs), (0, 0, *axes)
        if not self.notes.get("no vmap"):
            try:
                return torch.func.vmap(partial(self._of_one, axes), in_dims=in_dims)(*tensors)
            except (_NotThisReading, torch.OutOfMemoryError):
                raise
            except Exception as error:  # whatever a layer may do that vmap cannot
                if "randomness" in str(error):
                    raise _NotThisReading from error
                found = self._one_by_one(axes, in_dims, tensors)
                self.notes["no vmap"] = True
                return found
        return self._one_by_one(axes, in_dims, tensors)

    def _of_one(self, axes: Axes, row: Tensor, grad: Tensor, *example: Tensor) -> Found:
        """One example's, for vmap; `row` (B,) tells which one it is."""
        free, fixed = self._parameters()
        y, pull = torch.func.vjp(lambda p: self._output(axes, {**fixed, **p}, len(row), grad, example), free)[:2]
        return pull(_one_row(y, row, grad))[0], _its_marks(y, row)

    def _one_by_one(self, axes: Axes, in_dims: Axes, tensors: Sequence[Tensor]) -> Found:
        """All examples', by a backward for each."""
        free, fixed = self._parameters()
        free = {name: p.requires_grad_() for name, p in free.items()}
        values: dict[str, list[Tensor]] = {name: [] for name in free}
        marks = []
        for b in range(len(tensors[0])):
            row, grad, *example = [t if axis is None else t[b] for t, axis in zip(tensors, in_dims, strict=True)]
            every = {**fixed, **free}
            with torch.enable_grad(), replaced(self.layer, every), _NothingRandom():
                y = self._output(axes, {**fixed, **free}, len(row), grad, example)
                sources, of_y = list(free.values()), _one_row(y.detach(), row, grad)
                found = torch.autograd.grad(y, sources, of_y, allow_unused=True) if y.requires_grad else sources
            marks.append(_its_marks(y.detach(), row))
            for name, p, g in zip(free, sources, found, strict=True):
                values[name].append(torch.zeros_like(p) if g is None or g is p else g)
        return {name: torch.stack(found) for name, found in values.items()}, torch.stack(marks)

    def _parameters(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Those that are differentiated, and the others."""
        fixed = {name: wide(p.detach()) for name, p in self.layer.named_parameters()}
        return {name: fixed.pop(name) for name in self.wanted}, fixed

    def _output(
        self, axes: Axes, parameters: dict[str, Tensor], size: int, grad: Tensor, example: Sequence[Tensor]
    ) -> Tensor:
        """The layer's output for one example (1, ...), or for all (B, ...) where no argument holds them."""
        tensors = [each if axis is None else each.unsqueeze(0) for each, axis in zip(example, axes, strict=True)]
        with replaced(self.layer, parameters):
            y = self.forward(tensors)
        if not isinstance(y, Tensor) or y.shape != (1 if 0 in axes else size, *grad.shape):
            raise _NotThisReading
        return y

    def _agree(self, ours: Tensor, marks: Tensor, dtype: torch.dtype) -> bool:
        """Whether every example's output is what it was in the forward."""
        tolerance = max(self.tolerance, TOLERANCE.get(dtype, LOW_PRECISION))
        norms = marks[:, -1:]  # of each example
        close = (ours - marks).abs() <= tolerance * norms + 1e-12 * norms.nan_to_num(0, 0, 0).max()
        return bool((close | (ours == marks) | ~marks.isfinite() & ~ours.isfinite()).all())

    def _refuse(self, error: Exception | None) -> None:
        if error is not None and not isinstance(error, _NotThisReading):
            raise ValueError(
                f"{self.told} cannot be differentiated example by example ({type(error).__name__}: {error}); freeze "
                f"it, or let it run on a batch of one example"
            ) from error
        raise ValueError(
            f"{self.told} gives an example another output when it runs again alone than it gave in its batch: it mixes "
            f"examples, draws random numbers, changed in between, or has the examples elsewhere than in dimension 0 of "
            f"its arguments; "
            + ("call the model with use_cache=False" if self.cached else "freeze it, or put another layer in its place")
        )


def _one_row(y: Tensor, row: Tensor, grad: Tensor) -> Tensor:
    """The gradient of one example's loss in an output of that example alone, or of all."""
    of_y = grad.unsqueeze(0).to(y.dtype)
    return of_y if len(y) == 1 else torch.where(row.view(-1, *[1] * (y.dim() - 1)), of_y, torch.zeros_like(of_y))


def _its_marks(y: Tensor, row: Tensor) -> Tensor:
    """(K,): the marks of the example's own row."""
    marks = _marks(y)
    return marks[0] if len(y) == 1 else torch.where(row[:, None], marks, torch.zeros_like(marks)).sum(0)


def _marks(output: Tensor) -> Tensor:
    """(B, K): sums by which an example's output (B, ...) is recognised, and its norm."""
    with torch.no_grad():
        output = output.detach()
        rows = torch.view_as_real(output) if output.is_complex() else output
        rows = rows.double() if not rows.is_floating_point() else wide(rows)
        rows = rows.reshape(len(rows), -1)
        whole = rows.shape[1] // GROUPS * GROUPS
        body, rest = rows[:, :whole], rows[:, whole:]
        strided, parts = body.reshape(len(rows), -1, GROUPS).sum(1), body.reshape(len(rows), GROUPS, -1).sum(2)
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return torch.cat([strided, parts, rest.sum(1, keepdim=True), norm], 1)


def _same(one: Found, other: Found) -> bool:
    """Whether the gradients are the same to rounding."""
    pairs = [(one[0][name], other[0][name]) for name in one[0]]
    return all(bool((a - b).norm() <= 1e-5 * b.norm()) for a, b in pairs)


def inside_a_layer() -> bool:
    """Whether a layer runs in this thread whose parameters are replaced: those inside it are part of it."""
    return getattr(_thread, "depth", 0) > 0


@contextmanager
def replaced(layer: nn.Module, parameters: dict[str, Tensor]) -> Iterator[None]:
    """The layer with other tensors in the place of its parameters, by their names below it."""
    spots: list[tuple[dict[str, Any], str, Tensor]] = []
    for name, tensor in parameters.items():
        path, _, key = name.rpartition(".")
        spots.append((cast(Any, layer.get_submodule(path)._parameters), key, tensor))
    named = {id(registry[key]): tensor for registry, key, tensor in spots}
    everywhere = [  # a parameter may have several names
        (module._parameters, key, named[id(p)])
        for module in layer.modules()
        for key, p in module._parameters.items()
        if id(p) in named
    ]
    spots = [*everywhere, *spots]
    before: list[tuple[dict[str, Any], str, Any]] = [(registry, key, registry[key]) for registry, key, _ in spots]
    _thread.depth = getattr(_thread, "depth", 0) + 1
    try:
        for registry, key, tensor in spots:
            registry[key] = tensor
        yield
    finally:
        _thread.depth -= 1
        for registry, key, tensor in before:
            registry[key] = tensor
