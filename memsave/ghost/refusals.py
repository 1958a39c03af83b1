"""Refusals: what cannot be clipped exactly raises an error that names it and the remedy."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.checkpoint import CheckpointError

from memsave.ghost import _torch_internals as internals
from memsave.processes import class_of, local_part, process_count, without_group

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
        "make it permanent with torch.nn.utils.prune.remove, or write the mask as a parametrization "
        "(torch.nn.utils.parametrize)",
    ),
)
MAX_NAMES = 3  # listed for one reason


@dataclass(frozen=True)
class Refusal:
    """One module or parameter that cannot be clipped exactly."""

    name: str
    kind: str
    """The class, or "" for a parameter."""
    reason: str
    """The part of the sentence after the name."""
    remedy: str

    @classmethod
    def of(cls, name: str, module: nn.Module, reason: str, remedy: str) -> "Refusal":
        """The refusal of a module."""
        return cls(name or "the model", class_of(module).__name__, reason, remedy)


class LayerRefused(Exception):
    """Raised by the rule of a layer or an operator: this use of a parameter cannot be clipped exactly.

    `final`: whether that also holds where no gradient flows to the examples.
    """

    def __init__(self, reason: str, remedy: str, *, final: bool = False):
        super().__init__(f"{reason}; {remedy}")
        self.reason, self.remedy, self.final = reason, remedy, final


class Refused(ValueError):
    """What cannot be clipped exactly; the message has one sentence for each class, reason and remedy."""

    def __init__(self, refusals: Sequence[Refusal]):
        sentences = sentences_of(refusals)
        if len(sentences) > 1:
            sentences = [f"the model cannot be clipped exactly, for {len(sentences)} reasons:", *sentences]
        super().__init__("\n- ".join(sentences))
        self.refusals = tuple(refusals)


def raise_refusals(refusals: Iterable[Refusal]) -> None:
    """Raise one Refused for all refusals, if there are any."""
    found = list(refusals)
    if found:
        raise Refused(found)


def sentences_of(refusals: Iterable[Refusal]) -> list[str]:
    """One sentence for each class, reason and remedy."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for each in refusals:
        names = groups.setdefault((each.kind, each.reason, each.remedy), [])
        if each.name not in names:
            names.append(each.name)
    sentences = []
    for (kind, reason, remedy), names in groups.items():
        more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
        subject = (
            ", ".join(names[:MAX_NAMES]) + more + (f" ({kind})" if kind else "") + (": each" if len(names) > 1 else "")
        )
        sentences.append(f"{subject} {reason}; {remedy}")
    return sentences


def wrapped(model: nn.Module) -> Iterator[Refusal]:
    """Models whose gradients are exchanged between processes or devices, and compiled models."""
    for name, module in model.named_modules():
        if type(module).__name__ in WRAPPERS:
            yield Refusal(
                name or "the model",
                "",
                f"is wrapped in {type(module).__name__}, whose gradients leave the process unclipped",
                "give the GhostClipper the module inside it, and call that module",
            )
        if type(module).__name__ == "OptimizedModule" or internals.is_compiled(module):
            yield Refusal(
                name or "the model",
                "",
                "was compiled before the GhostClipper was attached, so its layers would run without it",
                "attach to the module that is not compiled (model._orig_mod of torch.compile), and compile after that",
            )


def batch_statistics(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[Refusal]:
    """Layers that use or keep statistics of the batch in their current mode."""
    for name, module in modules:
        if isinstance(module, internals.BatchNorm) and (module.training or module.running_mean is None):
            yield Refusal.of(
                name,
                module,
                "makes every example's gradient depend on the others",
                "replace it by a GroupNorm, or keep it in eval mode with its present statistics",
            )
        if isinstance(module, internals.InstanceNorm) and module.training and module.track_running_stats:
            yield Refusal.of(
                name,
                module,
                "tracks running statistics of the examples, which would be released without noise",
                "construct it with track_running_stats=False",
            )


def hook_computed_weights(model: nn.Module) -> Iterator[Refusal]:
    """Layers with an older utility of `torch.nn.utils`, which computes a weight in a hook before the forward."""
    for name, module in model.named_modules():
        for hook in internals.forward_pre_hooks(module):
            for kind, utility, remedy in OLD_UTILITIES:
                if isinstance(hook, kind):
                    reason = f"has a weight that torch.nn.utils.{utility} computes in a hook, outside its forward"
                    yield Refusal.of(name, module, reason, remedy)


def gradient_hooks(parameters: Iterable[tuple[str, Tensor]]) -> Iterator[Refusal]:
    """Parameters with hooks on their gradient, which the clipper's backward does not form."""
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        if any(not getattr(hook, "observes_only", False) for hook in internals.gradient_hooks(parameter)):
            yield Refusal(
                name,
                "",
                "has a gradient hook, which would not be called, because its gradient is never formed",
                "remove the hook, and change .grad after clipper.backward",
            )


def frozen_after_forward(trainable: Mapping[str, nn.Parameter], used: Iterable[nn.Parameter]) -> Iterator[Refusal]:
    """Parameters that were trainable in the forward and are frozen in the backward."""
    names = {p: name for name, p in trainable.items()}
    for parameter in used:
        if not parameter.requires_grad:
            name = names.get(parameter, "a parameter")
            yield Refusal(name, "", "was frozen between its forward and this backward", "freeze it before the forward")


def source_of(function: Callable[..., Any]) -> str:
    """The module and qualified name under which a function was written, also of a partial or a bound method."""
    inner: Any = getattr(function, "func", function)
    inner = getattr(inner, "__func__", inner)
    if hasattr(inner, "__code__"):
        return f"{inner.__globals__['__name__']}.{inner.__code__.co_qualname}"
    return f"{type(inner).__module__}.{type(inner).__qualname__}"


def refuse_dependent_examples(mixed: Mapping[str, bool]) -> None:
    """Raise ValueError for the first layer in whose output one example's loss has a gradient in another's row."""
    for name, found in mixed.items():
        if found:
            raise ValueError(
                f"examples are not independent at {name}: the loss of one example has a gradient in another "
                f"example's row of its output; keep the batch in dimension 0 there, and let no later layer and no loss "
                f"mix examples"
            )


def refuse_used_elsewhere(
    trainable: Mapping[str, nn.Parameter], parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]
) -> None:
    """Raise ValueError for parameters that have an ordinary gradient: it passed no norm hook."""
    names = {p: name for name, p in trainable.items()}
    raise_refusals(
        Refusal(
            names[parameter],
            "",
            "has a gradient that passed no norm hook: it was used outside of the model's forward, in an earlier "
            "forward (a cached weight), or in code that is not followed (an autograd.Function, a scripted function)",
            "use it in operators of PyTorch inside the forward, register a rule for its layer (register_rule), or "
            "freeze it",
        )
        for parameter, gradient in zip(parameters, gradients, strict=True)
        if gradient is not None
    )


def refuse_without_group() -> None:
    """Raise ValueError in one of several processes that have no process group: nothing could add up their sums."""
    found = without_group()
    if found is not None:
        raise ValueError(
            f"{found}, but they have no process group, so each would clip and sum its own examples alone; call "
            f"torch.distributed.init_process_group() first"
        )


def refuse_other_group(processes: int) -> None:
    """Raise ValueError if the process group has another number of processes than when the clipper was attached."""
    if process_count() != processes:
        raise ValueError(
            f"the clipper was attached in one of {processes} processes, and now there are {process_count()}; call "
            f"torch.distributed.init_process_group() before you create it"
        )


class GradientWritten(ValueError):
    """The backward itself wrote `.grad`, unclipped."""


def _version(grad: Tensor | None) -> int:
    return 0 if grad is None else internals.version(local_part(grad))


@contextmanager
def written_gradients_refused(parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[None]:
    """Raise GradientWritten at the end if `.grad` was written inside, as by a backward inside the backward."""
    before = [(name, p, p.grad, _version(p.grad)) for name, p in parameters]
    yield
    for name, parameter, grad, version in before:
        if parameter.grad is not grad or _version(grad) != version:
            raise GradientWritten(
                f"the backward wrote the gradient of {name} by itself, unclipped (a backward inside the backward does "
                f"that); freeze it, or use memsave.reversible or checkpoints with use_reentrant=False"
            )


@contextmanager
def checkpoint_errors_explained() -> Iterator[None]:
    """Turn PyTorch's errors about checkpoints into a ValueError that names the remedy."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, CheckpointError):
            raise ValueError(
                f"a checkpoint recomputed something else than in the forward ({str(error).splitlines()[0]}); let "
                f"it run the same operators on tensors whose first dimension is the batch, or do without it there"
            ) from error
        if not internals.is_reentrant_checkpoint_error(error):
            raise
        raise ValueError(
            "the model runs under reentrant checkpoints, which cannot be differentiated for norms; checkpoint with "
            "use_reentrant=False"
        ) from error
