"""Which modules of a model get a tap."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from memsave.ghost import refusals
from memsave.ghost.layer import Layer, RelativeBias
from memsave.ghost.refusals import Refusal

FOLDING = ("OPTDecoderLayer",)  # their layers see (B T, d), the places of an example in a row
PROMPTS = ("PromptEmbedding", "PromptEncoder")  # of PEFT's prompt tuning and p-tuning
CONTAINERS = (nn.ParameterList, nn.ParameterDict)  # they have no forward
LEAF_ELEMENTS = 2**20  # a module with parameters and children is one layer up to this size, refused above


def find_refusals(model: nn.Module) -> Iterator[Refusal]:
    """What can be told of the model before it runs, but for its layers."""
    yield from refusals.wrapped(model)
    yield from refusals.statistics(model.named_modules())
    yield from refusals.replaced_weights(model)
    yield from refusals.parameter_hooks(model.named_parameters())
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
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
                "looks its prompt up once for the whole batch, where the examples' gradients are summed already",
                "take prefix tuning or LoRA",
            )


def attach_layers(clipper: Any, model: nn.Module) -> tuple[list[Layer | RelativeBias], list[Refusal]]:
    """A layer for every module that owns trainable parameters, and the refusals of those that cannot have one.

    A module that owns parameters beside children with parameters, or whose weights are parametrised, is one layer: the
    layers of its children are then part of it while it runs, and layers of their own when they are called from outside.
    """
    layers: list[Layer | RelativeBias] = []
    refused: list[Refusal] = []
    folding = [name for name, module in model.named_modules() if type(module).__qualname__ in FOLDING]
    biases = {module.relative_attention_bias for module in model.modules() if RelativeBias.applies(module)}
    for name, module in model.named_modules():
        if RelativeBias.applies(module):
            layers.append(RelativeBias(clipper, module, name=name or "the model"))
            continue
        own = [key for key, p in _own(module) if p.requires_grad]
        parametrized = is_parametrized(module)
        if (not own and not parametrized) or module in biases or isinstance(module, CONTAINERS):
            continue
        names = tuple(key for key, p in module.named_parameters() if own or p.requires_grad)
        refusal = _refusal(name, module, own, parametrized)
        if refusal is not None:
            if not any(isinstance(each, Layer) and module in set(each.module.modules()) for each in layers):
                refused.append(refusal)
            continue  # inside another layer it is differentiated as a part of that one
        layer = Layer(clipper, module, name=name or "the model", names=names)
        layer.folded = any(parent and name.startswith(f"{parent}.") for parent in folding)
        layers.append(layer)
    return layers, refused


def _own(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's own parameters, those in its lists and dictionaries of parameters included."""
    for key, parameter in module._parameters.items():
        if parameter is not None:
            yield key, parameter
    for key, child in module._modules.items():
        if isinstance(child, CONTAINERS):
            yield from ((f"{key}.{name}", parameter) for name, parameter in _own(child))


def _refusal(name: str, module: nn.Module, own: list[str], parametrized: bool) -> Refusal | None:
    replaced = vars(module).get("forward")
    attached = getattr(replaced, "__self__", None)
    if isinstance(attached, Layer) and not attached.detached:
        return Refusal(name or "the model", "", "has another GhostClipper attached", "close() that one first")
    trainable = {key: p for key, p in module.named_parameters() if p.requires_grad}
    elements = sum(p.numel() for p in trainable.values() if not is_lazy(p))
    if replaced is not None and elements > LEAF_ELEMENTS:
        return Refusal.of(
            name,
            module,
            f"runs another forward than its class's ({refusals.described(replaced)}), for which no rule is exact",
            "attach the GhostClipper before the forward is replaced, or undo that",
        )
    if len(trainable) <= len(own) and not parametrized:
        return None
    if isinstance(module, nn.MultiheadAttention) or elements > LEAF_ELEMENTS:
        what = f"owns {own[0]}" if own else "has parametrised weights"
        return Refusal.of(
            name,
            module,
            f"{what} and has children with parameters, for which no rule is exact",
            f"freeze {own[0] if own else 'it'}, or move it into a module of its own",
        )
    return None
