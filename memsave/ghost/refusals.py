"""What cannot be clipped exactly: each refusal names it and the remedy."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


def refuse_wrapped(model: nn.Module) -> None:
    """Models whose gradients are exchanged between processes or devices."""
    for name, module in model.named_modules():
        if type(module).__name__ in WRAPPERS:
            raise ValueError(
                f"{name or 'the model'} is wrapped in {type(module).__name__}, whose gradients leave the process "
                f"unclipped; give the GhostClipper the module inside it, and call that one"
            )
    for name, parameter in model.named_parameters():
        if "DTensor" in (type(parameter).__name__, type(parameter.data).__name__):
            raise ValueError(f"{name} is sharded over processes, where no norm is exact; give an unsharded model")


def refuse_statistics(model: nn.Module) -> None:
    """Layers in which the statistics of a batch are used or kept, as they are set now."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{name} is a {type(module).__name__}, in which every example's gradient depends on the others; put a "
                f"GroupNorm in its place, or leave it in eval mode with the statistics that it has"
            )
        if isinstance(module, _InstanceNorm) and module.training and module.track_running_stats:
            raise ValueError(
                f"{name} is a {type(module).__name__} that tracks running statistics of the examples, which no noise "
                f"would hide; construct it with track_running_stats=False"
            )


def refuse_updated_buffers(model: nn.Module, before: Sequence[tuple[str, Tensor, int]]) -> None:
    """Buffers that a forward changed: they hold something of the examples, which no noise would hide."""
    now = dict(model.named_buffers())
    for name, buffer, version in before:
        if now.get(name) is not buffer or buffer._version != version:
            raise ValueError(
                f"the forward changed the buffer {name}, which holds something of the examples then and would be "
                f"released without noise; keep it as it is while training"
            )


def refuse_mixed(mixed: Mapping[str, Tensor]) -> None:
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
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            raise ValueError(
                f"{names[parameter]} is used outside the forward of the module that owns it, where no rule sees its "
                f"gradient; freeze it, or use it through its module"
            )


@contextmanager
def reentrant_checkpoints_refused() -> Iterator[None]:
    """PyTorch's own error about them, as one of ours."""
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant=True" not in str(error):
            raise
        raise ValueError(
            "the model runs under reentrant checkpoints, which cannot be differentiated for norms; checkpoint with "
            "use_reentrant=False"
        ) from error
