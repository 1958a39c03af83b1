"""Which modules of a model get a norm hook, and the state of an attached model."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from memsave.ghost import _torch_internals as internals
from memsave.ghost import refusals
from memsave.ghost.groups import Groups, groups_by_layer
from memsave.ghost.layer_patch import LayerPatch, RelativeBiasPatch
from memsave.ghost.owners import clear_owner, set_owner
from memsave.ghost.refusals import Refusal, raise_refusals

FOLDING = ("OPTDecoderLayer",)  # the layers inside see (B T, d), with the positions of an example next to each other
PROMPTS = ("PromptEmbedding", "PromptEncoder")  # PEFT's prompt tuning and p-tuning
CONTAINERS = (nn.ParameterList, nn.ParameterDict)  # they have no forward
MAX_GENERIC_ELEMENTS = 2**20  # a module with parameters and children is one layer up to this size, refused above


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
        self._clipper, self._direct, self._per_layer = clipper, direct, per_layer
        self._parameters: set[Tensor] = set()
        self._patches: list[LayerPatch | RelativeBiasPatch] = []

    def attach(self, model: nn.Module) -> None:
        """Patch the layers with trainable parameters; raises one ValueError for all that cannot be clipped."""
        refused = list(find_refusals(model))
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._parameters = set(self.trainable.values())
        self.groups = groups_by_layer(model) if self._per_layer else None
        if not self._direct:
            self._patches, more = patch_layers(self._clipper, model)
            refused += more
            set_owner(self._clipper, self.trainable.values())
        try:
            raise_refusals(refused)
        except ValueError:
            self.detach()
            raise

    def detach(self) -> None:
        """Restore the layers."""
        for patch in self._patches:
            patch.detach()
        clear_owner(self._clipper)
        self._patches, self.trainable = [], {}

    def is_current(self, model: nn.Module) -> bool:
        """Whether the same parameters are trainable as when the layers were patched."""
        now = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return now.keys() == self.trainable.keys() and all(p is self.trainable[name] for name, p in now.items())

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
    for name, module in model.named_modules():
        if type(module).__qualname__ in PROMPTS and any(p.requires_grad for p in module.parameters()):
            yield Refusal.of(
                name,
                module,
                "looks its prompt up once for the whole batch, which sums the gradients of the examples",
                "use prefix tuning or LoRA",
            )


def patch_layers(clipper: Any, model: nn.Module) -> tuple[list[LayerPatch | RelativeBiasPatch], list[Refusal]]:
    """Patch every module that owns trainable parameters; returns the patches, and refusals for the other modules.

    A module that owns parameters besides children with parameters, or whose weights are parametrised, is one layer.
    Its children are part of it while it runs, and layers of their own when they are called from outside.
    """
    patches: list[LayerPatch | RelativeBiasPatch] = []
    refused: list[Refusal] = []
    folding = [name for name, module in model.named_modules() if type(module).__qualname__ in FOLDING]
    biases = {module.relative_attention_bias for module in model.modules() if RelativeBiasPatch.applies(module)}
    for name, module in model.named_modules():
        if RelativeBiasPatch.applies(module):
            patches.append(RelativeBiasPatch(clipper, module, name=name or "the model"))
            continue
        own = [key for key, p in _own_parameters(module) if p.requires_grad]
        parametrized = is_parametrized(module)
        if (not own and not parametrized) or module in biases or isinstance(module, CONTAINERS):
            continue
        names = tuple(key for key, p in module.named_parameters() if own or p.requires_grad)
        refusal = _refusal(name, module, own, parametrized)
        if refusal is not None:
            if not any(isinstance(each, LayerPatch) and module in set(each.module.modules()) for each in patches):
                refused.append(refusal)
            continue  # inside another layer, it is differentiated as a part of that layer
        patch = LayerPatch(clipper, module, name=name or "the model", parameter_names=names)
        patch.folded = any(parent and name.startswith(f"{parent}.") for parent in folding)
        patches.append(patch)
    return patches, refused


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's own parameters, including those in its lists and dictionaries of parameters."""
    for key, parameter in internals.own_parameters(module).items():
        if parameter is not None:
            yield key, parameter
    for key, child in internals.own_children(module):
        if isinstance(child, CONTAINERS):
            yield from ((f"{key}.{name}", parameter) for name, parameter in _own_parameters(child))


def _refusal(name: str, module: nn.Module, own: list[str], parametrized: bool) -> Refusal | None:
    replaced = vars(module).get("forward")
    owner = getattr(replaced, "__self__", None)
    if isinstance(owner, LayerPatch) and not owner.detached:
        return Refusal(name or "the model", "", "has another GhostClipper attached", "close() that one first")
    trainable = {key: p for key, p in module.named_parameters() if p.requires_grad}
    elements = sum(p.numel() for p in trainable.values() if not internals.is_lazy(p))
    if replaced is not None and elements > MAX_GENERIC_ELEMENTS:
        return Refusal.of(
            name,
            module,
            f"runs another forward than its class's ({refusals.source_of(replaced)}), for which no rule is exact",
            "attach the GhostClipper before the forward is replaced, or undo the replacement",
        )
    if len(trainable) <= len(own) and not parametrized:
        return None
    if isinstance(module, nn.MultiheadAttention) or elements > MAX_GENERIC_ELEMENTS:
        reason = f"owns {own[0]}" if own else "has parametrised weights"
        return Refusal.of(
            name,
            module,
            f"{reason} and has children with parameters, for which no rule is exact",
            f"freeze {own[0] if own else 'it'}, or move it into a separate module",
        )
    return None
