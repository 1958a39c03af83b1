"""Which layers of a model get a norm hook by a rule, and the state of an attached model."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from memsave.ghost import _torch_internals as internals
from memsave.ghost import refusals, rules  # noqa: F401 (importing the rules registers them)
from memsave.ghost.groups import Groups, groups_by_layer
from memsave.ghost.layer_patch import LayerPatch
from memsave.ghost.owners import clear_owner, clipper_of, set_owner
from memsave.ghost.refusals import Refusal, raise_refusals
from memsave.ghost.rule import Rule, registered_rule
from memsave.ghost.sharding import Sharding


class Attachment:
    """The patched layers of a model, and the parameters that were trainable when they were patched.

    Args:
        clipper: gives the patches the context of each forward, by `context_for(layer)`.
        direct: whether no layer is patched, because gradients are formed by an ordinary backward.
        per_layer: whether each layer is clipped as a group.
    """

    def __init__(self, clipper: Any, *, direct: bool, per_layer: bool) -> None:
        self.trainable: dict[str, nn.Parameter] = {}
        """The trainable parameters by name."""
        self.groups: Groups | None = None
        self.sharding = Sharding()
        """What FSDP shards; of those parameters, `trainable` has the whole copies."""
        self._clipper, self._direct, self._per_layer = clipper, direct, per_layer
        self._parameters: set[Tensor] = set()
        self._patches: list[LayerPatch] = []

    def attach(self, model: nn.Module) -> None:
        """Patch the layers with trainable parameters; raises one ValueError for all that cannot be clipped."""
        self.sharding.find(model)
        sharded = self.sharding.refusals(model, passes=self._clipper.passes, per_layer=self._per_layer)
        raise_refusals([*find_refusals(model), *sharded, *self._other_clippers(model)])
        self.sharding.update(model)
        self.sharding.sum_gradients()
        self.trainable = self._trainable_now(list(model.named_modules()))
        self._parameters = set(self.trainable.values())
        self.groups = groups_by_layer(model, copy_of=self.sharding.whole) if self._per_layer else None
        if not self._direct:
            self._patches = patch_layers(self._clipper, model)
            set_owner(self._clipper, self.trainable.values())

    def _other_clippers(self, model: nn.Module) -> Iterator[Refusal]:
        for name, parameter in model.named_parameters():
            if clipper_of(self.sharding.whole(parameter)) not in (None, self._clipper):
                yield Refusal(name, "", "has another GhostClipper attached", "close() that one first")

    def detach(self) -> None:
        """Restore the layers."""
        for patch in self._patches:
            patch.detach()
        clear_owner(self._clipper)
        self.sharding.restore()
        self._patches, self.trainable = [], {}

    @property
    def has_rules(self) -> bool:
        """Whether every trainable parameter belongs to a layer that is patched."""
        own = (p for patch in self._patches for p in patch.module.parameters(recurse=False))
        patched = {self.sharding.whole(p) for p in own}
        return patched >= set(self.trainable.values())

    def is_current(self, model: nn.Module, modules: list[tuple[str, nn.Module]]) -> bool:
        """Whether the same parameters are trainable as when the layers were patched; `modules` are the model's own."""
        self.sharding.update(model)
        now = self._trainable_now(modules)
        return now.keys() == self.trainable.keys() and all(p is self.trainable[name] for name, p in now.items())

    def _trainable_now(self, modules: list[tuple[str, nn.Module]]) -> dict[str, nn.Parameter]:
        """What `named_parameters` finds, from modules that were listed before, because listing them takes time."""
        found, seen = dict[str, nn.Parameter](), set()
        for path, module in modules:
            for key, own in internals.own_parameters(module).items():
                if own is None or id(own) in seen:
                    continue
                seen.add(id(own))
                parameter = self.sharding.whole(own)
                if parameter.requires_grad:
                    found[f"{path}.{key}" if path else key] = parameter
        return found

    @property
    def summed(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name, as an optimizer has them: their `.grad` has the clipped sums."""
        return {name: self.sharding.shard(p) for name, p in self.trainable.items()}

    def holds(self, parameter: Tensor) -> bool:
        """Whether it was a trainable parameter when the layers were patched."""
        return parameter in self._parameters


def find_refusals(model: nn.Module) -> Iterator[Refusal]:
    """What can be refused before the model runs, except what concerns single layers."""
    yield from refusals.wrapped(model)
    yield from refusals.batch_statistics(model.named_modules())
    yield from refusals.hook_computed_weights(model)
    yield from refusals.gradient_hooks(model.named_parameters())
    for name, parameter in model.named_parameters():
        if internals.is_lazy(parameter):
            yield Refusal(name, "", "has no shape yet", "run the model once before the GhostClipper is attached")
        elif not isinstance(parameter, nn.Parameter):
            yield Refusal(
                name,
                "",
                "has another tensor in its place (torch.func.functional_call puts it there)",
                "call the model with its own parameters",
            )


def patch_layers(clipper: Any, model: nn.Module) -> list[LayerPatch]:
    """Patch every layer that has a rule and whose own trainable parameters are a weight and a bias.

    All other uses of parameters are found by the operators that use them (see `operator_trace.py`).
    """
    patches = []
    for name, module in model.named_modules():
        own = {key: p for key, p in internals.own_parameters(module).items() if p is not None}
        rule = rule_of_layer(module) if any(p.requires_grad for p in own.values()) else None
        if rule is not None:
            names = tuple(own)
            patches.append(LayerPatch(clipper, module, rule=rule, name=name or "the model", parameter_names=names))
    return patches


def rule_of_layer(module: nn.Module) -> Rule | None:
    """The rule by which a layer is patched; None if the operators that use its parameters are followed instead."""
    own = {key: p for key, p in internals.own_parameters(module).items() if p is not None}
    if set(own) - {"weight", "bias"} or "forward" in vars(module) or any(p.is_complex() for p in own.values()):
        return None
    return registered_rule(module)
