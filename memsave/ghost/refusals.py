"""What cannot be clipped exactly: each refusal names it and the remedy."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.checkpoint import CheckpointError

from memsave.processes import several_processes

WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
OLD_UTILITIES = (
    (WeightNorm, "weight_norm", "use torch.nn.utils.parametrizations.weight_norm"),
    (
        SpectralNorm,
        "spectral_norm",
        "use torch.nn.utils.parametrizations.spectral_norm, and put it in eval mode (layer.parametrizations.eval())",
    ),
    (
        BasePruningMethod,
        "prune",
        "make it permanent by torch.nn.utils.prune.remove, or write the mask as a parametrization "
        "(torch.nn.utils.parametrize)",
    ),
)
SHOWN = 3  # names listed of those that are refused for the same reason


@dataclass(frozen=True)
class Refusal:
    """One module or parameter that cannot be clipped exactly."""

    name: str
    kind: str
    """The class, or "" for a parameter."""
    reason: str
    """What follows the name in the sentence."""
    remedy: str

    @classmethod
    def of(cls, name: str, module: nn.Module, reason: str, remedy: str) -> "Refusal":
        """The refusal of a module."""
        return cls(name or "the model", type(module).__name__, reason, remedy)


class Refused(Exception):
    """Raised by a layer rule: this layer cannot be clipped exactly."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(f"{reason}; {remedy}")
        self.reason, self.remedy = reason, remedy


def raise_refusals(refusals: Iterable[Refusal]) -> None:
    """Raise one ValueError for all of them: one sentence for each class, reason and remedy."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for each in refusals:
        names = groups.setdefault((each.kind, each.reason, each.remedy), [])
        if each.name not in names:
            names.append(each.name)
    sentences = []
    for (kind, reason, remedy), names in groups.items():
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        subject = (
            ", ".join(names[:SHOWN]) + more + (f" ({kind})" if kind else "") + (": each" if len(names) > 1 else "")
        )
        sentences.append(f"{subject} {reason}; {remedy}")
    if len(sentences) == 1:
        raise ValueError(sentences[0])
    if sentences:
        raise ValueError(
            "\n- ".join([f"the model cannot be clipped exactly, for {len(sentences)} reasons:", *sentences])
        )


def wrapped(model: nn.Module) -> Iterator[Refusal]:
    """Models whose gradients are exchanged between processes or devices, and compiled models."""
    for name, module in model.named_modules():
        if type(module).__name__ in WRAPPERS:
            yield Refusal(
                name or "the model",
                "",
                f"is wrapped in {type(module).__name__}, whose gradients leave the process unclipped",
                "give the GhostClipper the module inside it, and call that one",
            )
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            yield Refusal(
                name or "the model",
                "",
                "was compiled before the GhostClipper was attached, so its layers would run without it",
                "attach to the module that is not compiled (model._orig_mod of torch.compile), and compile after that",
            )
    for name, parameter in model.named_parameters():
        if "DTensor" in (type(parameter).__name__, type(parameter.data).__name__):
            yield Refusal(name, "", "is sharded over processes, where no norm is exact", "give an unsharded model")


def statistics(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[Refusal]:
    """Layers in which the statistics of a batch are used or kept, as they are set now."""
    for name, module in modules:
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            yield Refusal.of(
                name,
                module,
                "makes every example's gradient depend on the others",
                "put a GroupNorm in its place, or leave it in eval mode with the statistics that it has",
            )
        if isinstance(module, _InstanceNorm) and module.training and module.track_running_stats:
            yield Refusal.of(
                name,
                module,
                "tracks running statistics of the examples, which would be released without noise",
                "construct it with track_running_stats=False",
            )


def replaced_weights(model: nn.Module) -> Iterator[Refusal]:
    """The older utilities of `torch.nn.utils`, which compute a weight in a hook, before the layer's own forward."""
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            for kind, utility, remedy in OLD_UTILITIES:
                if isinstance(hook, kind):
                    reason = f"has a weight that torch.nn.utils.{utility} computes in a hook, outside its forward"
                    yield Refusal.of(name, module, reason, remedy)


def parameter_hooks(parameters: Iterable[tuple[str, Tensor]]) -> Iterator[Refusal]:
    """Hooks that want a parameter's gradient, which backward does not form here."""
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        both = (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None))
        hooks = [hook for registered in both for hook in (registered or {}).values()]
        if any(not getattr(hook, "observes_only", False) for hook in hooks):
            yield Refusal(
                name,
                "",
                "has a gradient hook, which would not be called: its gradient is never formed",
                "remove the hook, and change .grad after clipper.backward",
            )


def frozen_since(trainable: Mapping[str, nn.Parameter], used: Iterable[nn.Parameter]) -> Iterator[Refusal]:
    """Parameters that were trainable in the forward and are not in the backward."""
    names = {p: name for name, p in trainable.items()}
    for parameter in used:
        if not parameter.requires_grad:
            name = names.get(parameter, "a parameter")
            yield Refusal(name, "", "was frozen between its forward and this backward", "freeze it before the forward")


def side_outputs(layers: Iterable[str]) -> Iterator[Refusal]:
    """Layers that give the losses a gradient past their output."""
    for name in sorted(layers):
        yield Refusal(
            name,
            "",
            "gives the losses something beside its output (a tensor kept as an attribute, or a hook on a module inside "
            "it), whose gradient would be lost",
            "return it as a part of the output, detach it, or freeze the layer",
        )


def described(function: Callable[..., Any]) -> str:
    """Where a function was written, whatever it wraps and is named after."""
    inner: Any = getattr(function, "func", function)
    inner = getattr(inner, "__func__", inner)
    if hasattr(inner, "__code__"):
        return f"{inner.__globals__['__name__']}.{inner.__code__.co_qualname}"
    return f"{type(inner).__module__}.{type(inner).__qualname__}"


def refuse_mixed(mixed: Mapping[str, bool]) -> None:
    """Layers in whose output the loss of one example has a gradient in another's row; `mixed` is by layer."""
    for name, found in mixed.items():
        if found:
            raise ValueError(
                f"examples are not apart at {name}: the loss of one has a gradient in another's row of its output; "
                f"keep the batch in dimension 0 there, and let no later layer and no loss mix examples"
            )


def refuse_escaped(model: nn.Module, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    """Parameters that have an ordinary gradient, past every tap."""
    names = {p: name for name, p in model.named_parameters()}
    raise_refusals(
        Refusal(
            names[parameter],
            "",
            "is used outside the forward of the module that owns it, where no rule sees its gradient",
            "freeze it, or use it through its module",
        )
        for parameter, gradient in zip(parameters, gradients, strict=True)
        if gradient is not None
    )


def refuse_several_processes() -> None:
    """Refuse to clip in one of several processes: nothing would add up their sums."""
    found = several_processes()
    if found is not None:
        raise ValueError(f"{found}, and each would clip and sum its own examples alone; start one process")


class GradientWritten(ValueError):
    """Somebody else wrote `.grad` in the backward."""


@contextmanager
def gradients_left_alone(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Within, nothing writes `.grad`, as a backward inside the backward would; raises GradientWritten at the end."""
    before = {name: (p.grad, p.grad._version) for name, p in parameters.items() if p.grad is not None}
    yield
    for name, parameter in parameters.items():
        grad, version = before.get(name, (None, 0))
        if parameter.grad is not grad or (grad is not None and grad._version != version):
            raise GradientWritten(
                f"the backward wrote the gradient of {name} by itself, unclipped (a backward inside the backward does "
                f"that); freeze it, or use memsave.reversible or checkpoints with use_reentrant=False"
            )


@contextmanager
def reentrant_checkpoints_refused() -> Iterator[None]:
    """PyTorch's own error about them, as one of ours."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, CheckpointError):
            raise ValueError(
                f"a checkpoint computed something else again than in the forward ({str(error).splitlines()[0]}); move "
                f"checkpoints out of layers that own parameters beside children with parameters"
            ) from error
        if "use_reentrant=True" not in str(error):
            raise
        raise ValueError(
            "the model runs under reentrant checkpoints, which cannot be differentiated for norms; checkpoint with "
            "use_reentrant=False"
        ) from error
