"""Any other layer: its own vector-Jacobian product, mapped over the examples.

Exact for every layer that treats the examples apart, at the memory of the per-example gradients of its parameters.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from memsave.ghost.gradients import Dense, Gradient, has_values, wide
from memsave.ghost.rules import Given, Use

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}  # an example's output alone against that in its batch
Axes = tuple[int | None, ...]


def generic(layer: nn.Module, given: Given) -> Use:
    """The rule of every layer that has none."""
    if any(isinstance(module, _DropoutNd) and module.training and module.p for module in layer.modules()):
        raise ValueError(
            f"a {type(layer).__name__} draws dropout masks inside a layer that is differentiated example by example; "
            f"set that dropout to 0"
        )
    spots: list[int | str] = [i for i, a in enumerate(given.args) if isinstance(a, Tensor)]
    spots += [key for key, a in given.kwargs.items() if isinstance(a, Tensor)]
    inputs = tuple(given.args[spot] if isinstance(spot, int) else given.kwargs[spot] for spot in spots)
    plain_args = [None if isinstance(a, Tensor) else a for a in given.args]
    plain_kwargs = {key: None if isinstance(a, Tensor) else a for key, a in given.kwargs.items()}
    wanted, forward = given.wanted, cast(Any, type(layer).forward)

    def run(parameters: dict[str, Tensor], tensors: Sequence[Tensor]) -> Any:
        """The layer's function of other parameters and inputs."""
        args, kwargs = list(plain_args), dict(plain_kwargs)
        for spot, tensor in zip(spots, tensors, strict=True):
            if isinstance(spot, int):
                args[spot] = tensor
            else:
                kwargs[spot] = tensor
        with replaced(layer, parameters):
            return forward(layer, *args, **kwargs)

    axes = _axes(layer, given, inputs, run)

    def per_example(saved: tuple[Tensor, ...], grad: Tensor) -> dict[str, Gradient]:
        parameters = {name: wide(p.detach()) for name, p in layer.named_parameters()}
        free = {name: parameters.pop(name) for name in wanted}

        def of_one(example_grad: Tensor, *example: Tensor) -> dict[str, Tensor]:
            tensors = [each if axis is None else each.unsqueeze(0) for each, axis in zip(example, axes, strict=True)]
            y, pull = torch.func.vjp(lambda p: run({**parameters, **p}, tensors), free)[:2]
            return pull(example_grad.unsqueeze(0).to(y.dtype))[0]

        values = torch.func.vmap(of_one, in_dims=(0, *axes))(grad, *map(wide, saved))
        return {name: Dense(value) for name, value in values.items()}

    return Use(given.args, given.kwargs, inputs, per_example)


def _axes(layer: nn.Module, given: Given, inputs: Sequence[Tensor], run: Any) -> Axes:
    """Which inputs have the examples in dimension 0.

    Their length tells, but a table of another kind may be as long. So the last example is run alone, and has to give
    what it gives in its batch; this is done once for each combination of lengths.
    """
    by_length = tuple(0 if each.dim() and len(each) == given.batch_size else None for each in inputs)
    key = (by_length, tuple(each.dim() for each in inputs))
    if given.batch_size == 1 or 0 not in by_length or not all(map(has_values, inputs)):
        return by_length
    if key not in given.notes:
        with torch.no_grad():
            given.notes[key] = _found_by_running(layer, by_length, inputs, run)
    return given.notes[key]


def _found_by_running(layer: nn.Module, by_length: Axes, inputs: Sequence[Tensor], run: Any) -> Axes:
    whole = run({}, inputs)
    for axes in product(*[(axis,) if axis is None else (axis, None) for axis in by_length]):
        if 0 in axes:
            try:
                alone = run({}, [each if axis is None else each[-1:] for each, axis in zip(inputs, axes, strict=True)])
            except (RuntimeError, IndexError, ValueError):  # sizes that do not go together
                continue
            if _is_last_of(whole, alone):
                return axes
    raise ValueError(
        f"a {type(layer).__name__} gives an example another output alone than in its batch: it mixes examples, draws "
        f"random numbers, or has them elsewhere than in dimension 0; freeze it, or put another layer in its place"
    )


def _is_last_of(whole: Any, alone: Any) -> bool:
    if not isinstance(whole, Tensor) or not isinstance(alone, Tensor) or whole[-1:].shape != alone.shape:
        return not isinstance(whole, Tensor)  # which the layer's caller refuses, and says what came
    tolerance = TOLERANCE.get(alone.dtype, 3e-2)
    scale = whole[-1:].abs().nan_to_num(0, 0, 0).max().item() if alone.numel() else 0.0
    return torch.allclose(alone, whole[-1:], rtol=tolerance, atol=tolerance * scale, equal_nan=True)


@contextmanager
def replaced(layer: nn.Module, parameters: dict[str, Tensor]) -> Iterator[None]:
    """The layer with other tensors in the place of its parameters, by their names below it."""
    spots = []
    for name, tensor in parameters.items():
        path, _, key = name.rpartition(".")
        spots.append((layer.get_submodule(path)._parameters, key, tensor))
    before: list[tuple[dict[str, Any], str, Any]] = [(registry, key, registry[key]) for registry, key, _ in spots]
    try:
        for registry, key, tensor in spots:
            cast(dict[str, Any], registry)[key] = tensor
        yield
    finally:
        for registry, key, tensor in before:
            registry[key] = tensor
