"""The rule of any other layer: its own vector-Jacobian product, example by example.

It is exact for every layer in which examples are independent, and takes the memory of the per-example gradients of the
layer's parameters. The layer is replayed in the backward, on one example at a time. For every example, the output of
the replay is compared with the output of the forward. A layer that mixes examples, draws random numbers or has changed
in between is therefore refused.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from memsave.ghost import _torch_internals as internals
from memsave.ghost.gradients import Gradient, PerSampleGrad, has_values, upcast
from memsave.ghost.parameter_swap import swapped_parameters
from memsave.ghost.refusals import LayerRefused
from memsave.ghost.rule import LayerInputs, RuleOutput

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}  # an example's output alone against its output in the batch
LOW_PRECISION = 3e-2  # the same for narrower outputs, and under autocast, because the replay runs in float32
PARTS = 8  # outputs are compared by the sums of every 8th element and of each of 8 parts
MAX_AMBIGUOUS = 6  # at most so many arguments are tried as tables of the batch's length; further ones hold examples

BatchAxes = tuple[int | None, ...]
"""For each tensor argument, the dimension of the examples, or None if it holds none."""
Replay = tuple[dict[str, Tensor], Tensor]
"""(gradients (B, ...) by parameter name, fingerprints (B, K) of the outputs)."""


def generic(layer: nn.Module, inputs: LayerInputs) -> RuleOutput:
    """The rule of every layer without a registered rule."""
    if getattr(layer, "sparse", False):
        raise LayerRefused("has sparse gradients, for which there is no rule", "construct it with sparse=False")
    if any(_draws_masks(module) for module in layer.modules()):
        raise LayerRefused(
            "draws dropout masks inside a layer that is differentiated example by example",
            "set that dropout to 0, or move it out of the layer",
        )
    leaves, spec = internals.tree_flatten((inputs.args, inputs.kwargs))
    slots = [slot for slot, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensor_args = tuple(leaves[slot] for slot in slots)
    run = inputs.forward  # not `inputs`: the closure must hold no tensors
    other_args = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def forward(tensors: Sequence[Tensor]) -> Any:
        """Run the layer with other tensors in place of its tensor arguments."""
        filled = list(other_args)
        for slot, tensor in zip(slots, tensors, strict=True):
            filled[slot] = tensor
        args, kwargs = internals.tree_unflatten(filled, spec)
        return run(*args, **kwargs)

    requires_grad = tuple(each.requires_grad for each in tensor_args)
    autocast = any(torch.is_autocast_enabled(kind) for kind in {each.device.type for each in tensor_args})
    tolerance = LOW_PRECISION if autocast else 0.0
    replay = _LayerReplay(layer, inputs, forward, requires_grad, tolerance)
    return RuleOutput(
        inputs.args,
        inputs.kwargs,
        tensor_args,
        replay.per_example_grads,
        replay_tolerance=tolerance,
        fingerprint=lambda output: (_fingerprints(output),),
    )


def _draws_masks(module: nn.Module) -> bool:
    if isinstance(module, nn.RNNBase):
        return module.training and module.dropout > 0 and module.num_layers > 1
    return isinstance(module, internals.Dropout) and module.training and module.p > 0


class _WrongBatchAxes(Exception):
    """An example alone does not give one row of the output, or the layer draws random numbers."""


class _RandomnessRefused(internals.TorchDispatchMode):
    """Inside, an operation that draws random numbers raises; dropout of probability zero draws none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            arguments = internals.operator_arguments(func)
            values = {arg.name: value for arg, value in zip(arguments, args, strict=False)} | (kwargs or {})
            probabilities = [values[name] for name in ("p", "dropout_p", "dropout") if name in values]
            defaults = [arg.default_value for arg in arguments if arg.name == "dropout_p"]
            if any(probabilities or defaults or [1.0]):
                raise _WrongBatchAxes
        return func(*args, **(kwargs or {}))


class _LayerReplay:
    """Replays a layer example by example. It keeps no tensor of the forward."""

    def __init__(
        self,
        layer: nn.Module,
        inputs: LayerInputs,
        forward: Callable[[Sequence[Tensor]], Any],
        requires_grad: tuple[bool, ...],
        tolerance: float,
    ):
        self.layer, self.trainable, self.cache = layer, inputs.trainable, inputs.cache
        self.label = f"{inputs.name} ({inputs.class_name})"
        all_args = (*inputs.args, *inputs.kwargs.values())
        self.takes_kv_cache = any(type(each).__name__.endswith("Cache") for each in all_args)
        self.forward, self.requires_grad, self.tolerance = forward, requires_grad, tolerance

    def per_example_grads(self, saved: tuple[Tensor, ...], grad: Tensor) -> dict[str, Gradient]:
        """The gradients, with the one choice of batch axes that gives every example its row of the output."""
        *args, fingerprints = saved
        key = (len(grad), tuple(each.shape for each in args))
        known_axes = self.cache.get(key)
        agreeing: list[Replay] = []
        error: Exception | None = None
        for axes in [known_axes] if known_axes is not None else self._candidate_axes(args, len(grad)):
            try:
                replay = self._run(axes, [upcast(each) for each in args], grad)
            except Exception as problem:
                error = problem
                continue
            if self._agrees(axes, replay[1], fingerprints, grad):
                agreeing.append(replay)
                last = axes
        if not agreeing:
            self._refuse(error)
        if len(agreeing) == 1:
            self.cache[key] = last
        elif any(not _same_grads(agreeing[0], each) for each in agreeing[1:]):
            raise ValueError(
                f"{self.label} gives the same output whether some argument of {len(grad)} rows holds examples or is a "
                f"table, but not the same gradient; use another batch size, or give the table as a buffer"
            )
        values = agreeing[0][0]
        return {name: PerSampleGrad(torch.view_as_real(v) if v.is_complex() else v) for name, v in values.items()}

    def _agrees(self, axes: BatchAxes, ours: Tensor, fingerprints: Tensor, grad: Tensor) -> bool:
        """Whether the replay gave every example the output of the forward."""
        if not has_values(grad):
            return True
        if 0 not in axes and len(grad) > 1 and not self._close(ours, ours[:1], grad.dtype):
            return False  # the outputs differ between examples, so they come from examples in opaque arguments
        return self._close(ours, fingerprints, grad.dtype)

    def _candidate_axes(self, args: Sequence[Tensor], size: int) -> Iterator[BatchAxes]:
        """The possible batch axes: arguments as long as the batch hold examples, or they are tables.

        An argument that requires a gradient is an activation of examples, never a table.
        """
        long = [bool(each.dim()) and len(each) == size for each in args]
        slots = range(len(args))
        ambiguous = [slot for slot in slots if long[slot] and not self.requires_grad[slot]][:MAX_AMBIGUOUS]
        choices = [((0, None) if slot in ambiguous else (0,)) if long[slot] else (None,) for slot in slots]
        if any(long):
            yield from (axes for axes in product(*choices) if 0 in axes)
        elif not any(self.requires_grad) and all(size not in each.shape for each in args):
            yield (None,) * len(args)  # the output does not depend on the examples

    def _run(self, axes: BatchAxes, inputs: Sequence[Tensor], grad: Tensor) -> Replay:
        """Replay all examples, by vmap if the layer supports it."""
        rows = torch.eye(len(grad), dtype=torch.bool, device=grad.device)
        tensors, in_dims = (rows, grad, *inputs), (0, 0, *axes)
        if not self.cache.get("no vmap"):
            try:
                return torch.func.vmap(partial(self._one_example, axes), in_dims=in_dims)(*tensors)
            except (_WrongBatchAxes, torch.OutOfMemoryError):
                raise
            except Exception as error:  # layers may do many things that vmap does not support
                if internals.is_vmap_randomness_error(error):
                    raise _WrongBatchAxes from error
                found = self._one_by_one(axes, in_dims, tensors)
                self.cache["no vmap"] = True
                return found
        return self._one_by_one(axes, in_dims, tensors)

    def _one_example(self, axes: BatchAxes, row: Tensor, grad: Tensor, *example: Tensor) -> Replay:
        """Replay one example, for vmap; `row` (B,) is its one-hot number."""
        free, fixed = self._parameters()
        y, pull = torch.func.vjp(lambda p: self._output(axes, {**fixed, **p}, len(row), grad, example), free)[:2]
        return pull(_own_output_grad(y, row, grad))[0], _own_fingerprint(y, row)

    def _one_by_one(self, axes: BatchAxes, in_dims: BatchAxes, tensors: Sequence[Tensor]) -> Replay:
        """Replay all examples, by one backward for each."""
        free, fixed = self._parameters()
        free = {name: p.requires_grad_() for name, p in free.items()}
        values: dict[str, list[Tensor]] = {name: [] for name in free}
        fingerprints = []
        for b in range(len(tensors[0])):
            row, grad, *example = [t if axis is None else t[b] for t, axis in zip(tensors, in_dims, strict=True)]
            parameters = {**fixed, **free}
            with torch.enable_grad(), swapped_parameters(self.layer, parameters), _RandomnessRefused():
                y = self._output(axes, parameters, len(row), grad, example)
                sources, of_y = list(free.values()), _own_output_grad(y.detach(), row, grad)
                found = torch.autograd.grad(y, sources, of_y, allow_unused=True) if y.requires_grad else sources
            fingerprints.append(_own_fingerprint(y.detach(), row))
            for name, p, g in zip(free, sources, found, strict=True):
                values[name].append(torch.zeros_like(p) if g is None or g is p else g)
        return {name: torch.stack(found) for name, found in values.items()}, torch.stack(fingerprints)

    def _parameters(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The parameters that are differentiated, and the others."""
        fixed = {name: upcast(p.detach()) for name, p in self.layer.named_parameters()}
        return {name: fixed.pop(name) for name in self.trainable}, fixed

    def _output(
        self, axes: BatchAxes, parameters: dict[str, Tensor], size: int, grad: Tensor, example: Sequence[Tensor]
    ) -> Tensor:
        """The layer's output for one example (1, ...), or for all (B, ...) if no argument holds examples."""
        tensors = [each if axis is None else each.unsqueeze(0) for each, axis in zip(example, axes, strict=True)]
        with swapped_parameters(self.layer, parameters):
            y = self.forward(tensors)
        if not isinstance(y, Tensor) or y.shape != (1 if 0 in axes else size, *grad.shape):
            raise _WrongBatchAxes
        return y

    def _close(self, ours: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
        """Whether the fingerprints of every example agree to rounding."""
        tolerance = max(self.tolerance, TOLERANCE.get(dtype, LOW_PRECISION))
        norms = expected[:, -1:]  # of each example's output
        close = (ours - expected).abs() <= tolerance * norms + 1e-12 * norms.nan_to_num(0, 0, 0).max()
        return bool((close | (ours == expected) | ~expected.isfinite() & ~ours.isfinite()).all())

    def _refuse(self, error: Exception | None) -> None:
        if error is not None and not isinstance(error, _WrongBatchAxes):
            raise ValueError(
                f"{self.label} cannot be differentiated example by example ({type(error).__name__}: {error}); freeze "
                f"it, or let it run on a batch of one example"
            ) from error
        raise ValueError(
            f"{self.label} gives an example another output in a replay of that example alone than in its batch: it "
            f"mixes examples, draws random numbers, changed in between, or has the examples elsewhere than in "
            f"dimension 0 of its arguments; "
            + (
                "call the model with use_cache=False"
                if self.takes_kv_cache
                else "freeze it, or replace it by another layer"
            )
        )


def _own_output_grad(y: Tensor, row: Tensor, grad: Tensor) -> Tensor:
    """The gradient of one example's loss with respect to the output of that example alone, or of all examples."""
    of_y = grad.unsqueeze(0).to(y.dtype)
    return of_y if len(y) == 1 else torch.where(row.view(-1, *[1] * (y.dim() - 1)), of_y, torch.zeros_like(of_y))


def _own_fingerprint(y: Tensor, row: Tensor) -> Tensor:
    """(K,): the fingerprint of the example's own row."""
    rows = _fingerprints(y)
    return rows[0] if len(y) == 1 else torch.where(row[:, None], rows, torch.zeros_like(rows)).sum(0)


def _fingerprints(output: Tensor) -> Tensor:
    """(B, K): sums that identify each example's output (B, ...), and its norm."""
    with torch.no_grad():
        output = output.detach()
        rows = torch.view_as_real(output) if output.is_complex() else output
        rows = rows.double() if not rows.is_floating_point() else upcast(rows)
        rows = rows.reshape(len(rows), -1)
        whole = rows.shape[1] // PARTS * PARTS
        body, rest = rows[:, :whole], rows[:, whole:]
        strided, parts = body.reshape(len(rows), -1, PARTS).sum(1), body.reshape(len(rows), PARTS, -1).sum(2)
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return torch.cat([strided, parts, rest.sum(1, keepdim=True), norm], 1)


def _same_grads(one: Replay, other: Replay) -> bool:
    """Whether the gradients agree to rounding."""
    pairs = [(one[0][name], other[0][name]) for name in one[0]]
    return all(bool((a - b).norm() <= 1e-5 * b.norm()) for a, b in pairs)
