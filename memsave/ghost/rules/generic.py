"""Any other layer: its own vector-Jacobian product, mapped over the examples.

Exact for every layer that treats the examples of its inputs' dimension 0 apart, at the memory of the per-example
gradients of its parameters.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from memsave.ghost.gradients import Dense, Gradient
from memsave.ghost.rules import Use


def generic(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch_size: int) -> Use:
    """The rule of every layer that has none."""
    forward = type(layer).forward
    spots: list[int | str] = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    spots += [key for key, a in kwargs.items() if isinstance(a, Tensor)]
    inputs = [args[spot] if isinstance(spot, int) else kwargs[spot] for spot in spots]
    axes: list[int | None] = [0 if each.dim() and len(each) == batch_size else None for each in inputs]
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    if any(isinstance(module, _DropoutNd) and module.training and module.p for module in layer.modules()):
        raise ValueError(
            f"a {type(layer).__name__} draws dropout masks inside a layer that is differentiated example by example; "
            f"set that dropout to 0"
        )

    def per_example(saved: tuple[Tensor, ...], grad: Tensor) -> dict[str, Gradient]:
        def of_one(example_grad: Tensor, *example: Tensor) -> dict[str, Tensor]:
            tensors = [each if axis is None else each.unsqueeze(0) for each, axis in zip(example, axes, strict=True)]

            def run(parameters: dict[str, Tensor]) -> Tensor:
                given, named = list(args), dict(kwargs)
                for spot, tensor in zip(spots, tensors, strict=True):
                    if isinstance(spot, int):
                        given[spot] = tensor
                    else:
                        named[spot] = tensor
                with replaced(layer, parameters):
                    return forward(layer, *given, **named)

            pull = torch.func.vjp(run, {name: layer.get_parameter(name).detach() for name in names})[1]
            return pull(example_grad.unsqueeze(0))[0]

        values = torch.func.vmap(of_one, in_dims=(0, *axes))(grad, *saved)
        return {name: Dense(value) for name, value in values.items()}

    return Use(args, tuple(inputs), per_example, kwargs)


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
