"""Models that FSDP2 shards (`trainer.parallel=fsdp`): each process holds a part of every parameter.

FSDP gathers the parameters of one *unit* at a time, a layer of a transformer or a branch of a coupling; what belongs to
no unit, such as embeddings and heads, is gathered for the whole step. Gradients are summed over the processes, as in
the other runs, and not averaged. Evaluation gathers the whole model, so that each process can evaluate its own share.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from memsave.processes import is_sharded
from memsave.reversible import AdditiveCoupling


def shard_model(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the model over the processes of the mesh, in place; its parameters move to the device of the mesh."""
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
        elif not isinstance(model, nn.ModuleList) or not any(True for _ in child.children()):
            yield from units(child)
        elif any(isinstance(each, AdditiveCoupling) for each in child.modules()):
            yield from units(child)
        elif type(child).forward is nn.Module.forward:  # it is never called, but its children are
            yield from child.children()
        else:
            yield child


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules on which `fully_shard` was called."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_sharded_model(model: nn.Module) -> bool:
    """Whether the model is sharded."""
    return isinstance(model, FSDPModule)


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


def copy_shard(target: Tensor, full: Tensor) -> None:
    """Write this process's part of a whole tensor into a sharded one; a tensor that is not sharded gets all of it."""
    if not is_sharded(target):
        target.copy_(full)
        return
    from torch.distributed.tensor import distribute_tensor

    part: Any = target
    full = full.to(part.to_local().device, part.dtype)
    shard: Any = distribute_tensor(full, part.device_mesh, part.placements, src_data_rank=None)
    with torch.no_grad():
        part.to_local().copy_(shard.to_local())
