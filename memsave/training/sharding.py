"""Models that FSDP2 shards (`trainer.parallel=fsdp`): each process holds a part of every parameter.

FSDP gathers the parameters of one *unit* at a time, a layer of a transformer or a branch of a coupling; what belongs to
no unit, such as embeddings and heads, is gathered for the whole step. Gradients are summed over the processes, as in
the other runs, and not averaged. Evaluation gathers the whole model, so that each process can evaluate its own share.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memsave.config.schema import TrainerConfig
from memsave.processes import is_fully_sharded, is_sharded, local_part, process_count
from memsave.reversible import AdditiveCoupling

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def wants_sharding(config: TrainerConfig) -> bool:
    """Whether this run shards its model."""
    return config.parallel == "fsdp" and process_count() > 1


def shard_model(model: nn.Module, device: torch.device, *, mesh: "DeviceMesh | None" = None) -> None:
    """Shard the model in place, over the processes of the mesh, or over all."""
    from torch.distributed.device_mesh import init_device_mesh  # both take a second
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # no loss of memsave changes what a model returns
    mesh = mesh or init_device_mesh(device.type, (process_count(),))
    for unit in units(model):
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # with NCCL a matter of taste; gloo has no other reduction


def units(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose parameters are gathered together: branches of couplings, and elements of lists of layers."""
    for child in model.children():
        if isinstance(child, AdditiveCoupling):
            yield from (child.f, child.g)
        elif not isinstance(model, nn.ModuleList) or not any(True for _ in child.children()) or _has_couplings(child):
            yield from units(child)
        elif type(child).forward is nn.Module.forward:  # it is never called, but its children are
            yield from child.children()
        else:
            yield child


def _has_couplings(module: nn.Module) -> bool:
    return any(isinstance(each, AdditiveCoupling) for each in module.modules())


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules on which `fully_shard` was called."""
    return [module for module in model.modules() if is_fully_sharded(module)]


def is_sharded_model(model: nn.Module) -> bool:
    """Whether the model is sharded."""
    return is_fully_sharded(model)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Within, each process has all parameters, and forwards need no communication; all processes enter it together."""
    modules = sharded_modules(model)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()


def full_tensors(named: dict[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """The whole tensors on the CPU, gathered one by one; empty on the processes that do not `keep` them."""
    found = {}
    for name, tensor in named.items():
        part: Any = tensor
        full = part.full_tensor() if is_sharded(tensor) else tensor
        if keep:
            found[name] = full.detach().cpu()
        del full
    return found


@torch.no_grad()
def copy_shard(target: Tensor, source: Tensor) -> None:
    """Copy a tensor, whole or with the same shards, into one that may be sharded: each process its own part."""
    if not is_sharded(target):
        target.copy_(source)
        return
    from torch.distributed.tensor import distribute_tensor

    part: Any = target
    local: Any = part.to_local()
    if not is_sharded(source):
        source = distribute_tensor(source.to(local.device), part.device_mesh, part.placements, src_data_rank=None)
    local.copy_(local_part(source))
