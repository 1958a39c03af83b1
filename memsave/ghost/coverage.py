"""Which trainable parameters of a model a GhostClipper clips exactly, before anything is trained.

    print(coverage(model))               # by the classes of the layers
    print(coverage(model, batch))        # by one forward, which shows every use of every parameter

Without a batch, only what can be refused before a forward is known. With one, the forward runs as in training, on any
device, also on `meta` and on fake tensors, where nothing is computed. No backward runs: what only a backward shows,
such as a loss that mixes examples, is not in the report (see `verify`).
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memsave.ghost import _torch_internals as internals
from memsave.ghost.attach import rule_of_layer
from memsave.ghost.backward_context import BackwardContext
from memsave.ghost.clipper import GhostClipper
from memsave.ghost.coverage_report import EXACT, REFUSED, UNUSED, Coverage, ParameterCoverage, Use
from memsave.ghost.gradients import has_values
from memsave.ghost.layer_patch import tensors_in
from memsave.ghost.norm_hook import HookSpec, NormHook
from memsave.ghost.refusals import Refusal, Refused
from memsave.ghost.rows import RowSplit
from memsave.ghost.sharding import refuse_sharded
from memsave.processes import class_of

Forward = Callable[[nn.Module, Any], Any]
PAST_THE_HOOKS = (
    "is used by code that is not followed (a torch.autograd.Function, a scripted function), so that its gradient "
    "passes no norm hook",
    "use it through PyTorch's own functions, or freeze it",
)
AFTER_A_REFUSAL = (
    "is used together with something that is refused, so that its gradient passes no norm hook",
    "apply the other remedies first",
)
FOLLOWED = "no rule for its layer: the operators that use it are followed, unless a forward shows otherwise"
NOT_USED = "the forward did not use it, so that it gets no gradient, and noise alone in private training"


def coverage(
    model: nn.Module, batch: Any = None, *, forward: Forward | None = None, batch_size: int | None = None
) -> Coverage:
    """Say for each trainable parameter whether it is clipped exactly, by which rule, and at which cost.

    Args:
        model: in the mode in which it is trained. It has the same buffers and gradients afterwards, and the random
            state is the same, too.
        batch: two examples or more; a tensor, a sequence of positional arguments or a mapping of named ones. None runs
            no forward, unless `forward` is given.
        forward: called with (model, batch) in place of the model, for other arguments; it may compute losses.
        batch_size: as of the GhostClipper.

    Exceptions of the forward itself are raised, and ValueError for a sharded model.
    """
    refuse_sharded(model, "coverage")
    observed = _Observed()
    refusals: list[Refusal] = []
    ran = batch is not None or forward is not None
    try:
        clipper = GhostClipper(model, max_grad_norm=1.0, passes=1, batch_size=batch_size)
    except Refused as refused:
        return _report(model, observed, list(refused.refusals), ran=False)
    try:
        if ran:
            with _unchanged(model), observed.forwards_of(model, clipper), torch.enable_grad():
                output = (forward or _call)(model, batch)
            observed.outputs += tensors_in([output])
    except Refused as refused:
        refusals += refused.refusals
    finally:
        clipper.close()
    return _report(model, observed, refusals, ran=ran)


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, Sequence) else model(batch)


class _Observed:
    """What the forwards of a model have shown."""

    def __init__(self) -> None:
        self.contexts: list[BackwardContext] = []
        self.outputs: list[Tensor] = []
        self.uses: dict[nn.Parameter, list[Use]] = {}

    def used_by(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """The classes of layers with a rule, and the operators, that used a parameter."""
        return tuple(sorted({by for context in self.contexts for by in context.used_by.get(parameter, ())}))

    @contextmanager
    def forwards_of(self, model: nn.Module, clipper: GhostClipper) -> Iterator[None]:
        """Inside, the forwards of the model are observed."""

        def before(_: nn.Module, __: Any) -> None:
            context = clipper.context_for("the model") if torch.is_grad_enabled() else None
            if context is not None and not internals.in_backward():
                context.observer = partial(self._observe, context.batch_size)
                self.contexts.append(context)

        def after(_: nn.Module, __: Any, output: Any) -> None:
            self.outputs += tensors_in([output])

        handles = [
            model.register_forward_pre_hook(before),
            model.register_forward_hook(after, prepend=True),  # before the clipper raises what it refuses
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _observe(
        self,
        batch_size: int,
        output: Tensor,
        spec: HookSpec,
        saved: tuple[Tensor, ...],
        parameters: list[nn.Parameter],
    ) -> None:
        """Record the uses at a norm hook."""
        uses = _uses(output, spec, saved, batch_size)
        for name, parameter in zip(spec.parameter_names, parameters, strict=True):
            use = uses.get(name) or Use.formed(parameter.shape, parameter.dtype)
            self.uses.setdefault(parameter, []).append(use)


def _uses(output: Tensor, spec: HookSpec, saved: tuple[Tensor, ...], batch_size: int) -> dict[str, Use]:
    """The form of each parameter's gradients, found without values if possible; none if it cannot be found."""
    examples = spec.rows.examples
    devices = [output.device] if isinstance(examples, Tensor) else [torch.device("meta"), output.device]
    computes = "cpu" if output.device.type == "meta" else output.device.type  # autocast knows no `meta`
    for device in devices:
        found = [each.detach() if each.device == device else torch.empty_like(each, device=device) for each in saved]
        split = RowSplit(spec.rows, examples if isinstance(examples, Tensor) else None, batch_size)
        grad = torch.zeros_like(output, device=device, requires_grad=False)
        try:
            with torch.no_grad(), torch.autocast(computes, enabled=False), internals.unfollowed():
                gradients = spec.per_example_grads(tuple(found), grad, split)
                return {name: Use.of(each) for name, each in gradients.items()}
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            continue  # what was computed from parameters is on another device than meta
    return {}


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the buffers and the random state at the end."""
    saved = [(each, dict(each)) for module in model.modules() if (each := internals.own_buffers(module))]
    buffers = {id(buffer): buffer for _, registry in saved for buffer in registry.values() if buffer is not None}
    with internals.unobserved():
        copies = [(each, each.detach().clone()) for each in buffers.values() if has_values(each)]
    devices = {each.device for each in [*model.parameters(), *buffers.values()] if each.device.type == "cuda"}
    state = random.getstate()
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        random.setstate(state)
        for registry, before in saved:
            registry.clear()
            registry.update(before)
        with torch.no_grad(), internals.unobserved():
            for buffer, copy in copies:
                if buffer.shape != copy.shape:
                    buffer.data = copy
                elif not torch.equal(buffer, copy):
                    buffer.copy_(copy)


def _report(model: nn.Module, observed: _Observed, refusals: list[Refusal], *, ran: bool) -> Coverage:
    owners: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for key, parameter in internals.own_parameters(module).items():
            if isinstance(parameter, nn.Parameter) and parameter.requires_grad:
                owners.setdefault(parameter, []).append((f"{path}.{key}" if path else key, module))
    refused = _by_parameter(model, owners, refusals)
    reached = set(internals.leaves_past(observed.outputs, NormHook))
    rows = []
    for parameter, places in owners.items():
        used_by = observed.used_by(parameter)
        verdict, why, remedy = EXACT, "", ""
        if parameter in refused:
            verdict, why, remedy = REFUSED, refused[parameter].reason, refused[parameter].remedy
        elif not ran:
            used_by = tuple(sorted({class_of(m).__name__ for _, m in places if rule_of_layer(m) is not None}))
            used_by, why = (used_by, "") if used_by else (("operators",), FOLLOWED)
        elif parameter in reached:
            verdict, (why, remedy) = REFUSED, AFTER_A_REFUSAL if refused else PAST_THE_HOOKS
            refusals = [*refusals, Refusal(places[0][0], "", why, remedy)]
        elif not used_by:
            verdict, why, remedy = UNUSED, NOT_USED, "freeze it, or give a batch that needs it"
        rows.append(_row(parameter, places, used_by, verdict, why, remedy, tuple(observed.uses.get(parameter, ()))))
    return Coverage(tuple(rows), tuple(dict.fromkeys(refusals)), ran)


def _row(
    parameter: nn.Parameter,
    places: list[tuple[str, nn.Module]],
    used_by: tuple[str, ...],
    verdict: str,
    why: str,
    remedy: str,
    uses: tuple[Use, ...],
) -> ParameterCoverage:
    (name, owner), *others = places
    return ParameterCoverage(
        name,
        tuple(other for other, _ in others),
        tuple(parameter.shape),
        parameter.dtype,
        class_of(owner).__name__,
        used_by,
        verdict,
        why,
        remedy,
        uses,
    )


def _by_parameter(
    model: nn.Module, owners: dict[nn.Parameter, list[tuple[str, nn.Module]]], refusals: list[Refusal]
) -> dict[nn.Parameter, Refusal]:
    """The first refusal of each parameter: by its name, or of a module by its own parameters, or all inside it."""
    names = {name: parameter for parameter, places in owners.items() for name, _ in places}
    modules = dict(model.named_modules())
    found: dict[nn.Parameter, Refusal] = {}
    for refusal in refusals:
        if refusal.name in names:
            found.setdefault(names[refusal.name], refusal)
            continue
        module = modules.get("" if refusal.name == "the model" else refusal.name)
        if module is None:
            continue
        own = [p for p in internals.own_parameters(module).values() if p in owners] if refusal.kind else []
        for parameter in own or module.parameters():
            if parameter in owners:
                found.setdefault(parameter, refusal)
    return found
