"""Models that FSDP2 shards (`torch.distributed.fsdp.fully_shard`).

Of each parameter there are two: the *shard*, a DTensor, which the optimizer updates, and the *whole* copy, which FSDP
gathers for a forward or a backward of the module and frees after it. Both are the same objects all the time. The
clipper works on the whole copies. FSDP adds the `.grad` of a whole copy, summed over the processes, to that of the
shard when the backward leaves the module. Therefore:

- clipped sums must exist by then: in the second pass (passes=2), or as soon as the backward has passed a layer
  (clipping="per_layer"). A backward for norms alone forms no `.grad`, so nothing is reduced after it;
- sums are not divided by the number of processes, and each process adds its own examples' gradients;
- all processes run the same number of backwards, because each gathers the parameters again;
- what was whole when the first backward began, such as the weight of a head outside of the model's forward, must be
  whole again for the next one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from memsave.ghost import _torch_internals as internals
from memsave.ghost._torch_internals import FsdpGroup
from memsave.ghost.refusals import Refusal
from memsave.processes import class_of, is_sharded, process_count

LOW_PRECISION = (torch.bfloat16, torch.float16)
SUM = (1.0, True)  # divided by one, and reduced as a sum: gloo has no other reduction
EMPTY_SHARE = (
    "the losses are empty, but the model is sharded, so that all processes must run the same backwards; give this "
    "process any example, with backward(losses, counted=torch.zeros(1))"
)
INCOMPLETE_GROUPS = (
    "the losses do not depend on some use of a parameter, so that its layer's clipped sum is complete only after FSDP "
    'has reduced its gradients; give clipping="flat", or freeze the layers whose output the losses do not use'
)


class Sharding:
    """The parameters of one model that FSDP manages; an empty one if the model is not sharded."""

    def __init__(self) -> None:
        self.groups: list[FsdpGroup] = []
        self._whole: dict[int, nn.Parameter] = {}  # by the id of the shard
        self._shard: dict[int, nn.Parameter] = {}  # by the id of the whole copy
        self._local: dict[int, Tensor] = {}  # by the id of either
        self._trained: dict[nn.Parameter, bool] = {}  # by whole copy, its requires_grad as of the last `update`
        self._reductions: list[tuple[FsdpGroup, tuple[float | None, bool]]] = []

    def __bool__(self) -> bool:
        return bool(self.groups)

    def find(self, model: nn.Module) -> None:
        """Find the groups of the model, without any communication."""
        self.groups = internals.fsdp_groups(model)
        self._whole, self._shard, self._local = {}, {}, {}
        for group in self.groups:
            for each in group.parameters():
                if each.whole is not None:
                    self._whole[id(each.shard)], self._shard[id(each.whole)] = each.whole, each.shard
                    self._local[id(each.shard)] = self._local[id(each.whole)] = each.local

    def update(self, model: nn.Module) -> None:
        """Find both copies of each parameter, gathering those that never were whole, and follow what is trainable."""
        self.find(model)
        missing = [group for group in self.groups if any(each.whole is None for each in group.parameters())]
        for group in missing:
            group.module.unshard()
            group.module.reshard()
        if missing:
            self.find(model)
        for whole in self._whole.values():
            self._follow(self.shard(whole), whole)

    def _follow(self, shard: nn.Parameter, whole: nn.Parameter) -> None:
        """Freeze or unfreeze both copies if one of them was: a user sees the one that the module has at that time."""
        before = self._trained.get(whole)
        unchanged = before is not None and shard.requires_grad == before
        now = self._trained[whole] = whole.requires_grad if unchanged else shard.requires_grad
        for each in (shard, whole):
            if each.requires_grad != now:
                each.requires_grad_(now)

    def whole(self, parameter: nn.Parameter) -> nn.Parameter:
        """The whole copy of a shard; any other parameter itself."""
        return self._whole.get(id(parameter), parameter)

    def shard(self, parameter: nn.Parameter) -> nn.Parameter:
        """The shard of a whole copy, which has the sum after a backward; any other parameter itself."""
        return self._shard.get(id(parameter), parameter)

    def local(self, parameter: Tensor) -> Tensor | None:
        """The data of this process, for either copy; None for a parameter that is not sharded."""
        return self._local.get(id(parameter))

    # Sums instead of means.

    def sum_gradients(self) -> None:
        """Let FSDP sum the gradients of the processes instead of averaging them."""
        for group in self.groups:
            self._reductions.append((group, group.reduction))
            group.reduction = SUM

    def restore(self) -> None:
        """Undo `sum_gradients`."""
        for group, reduction in self._reductions:
            group.reduction = reduction
        self._reductions = []

    # The backwards of one forward.

    def before_each_backward(self) -> Callable[[], None]:
        """A function to call before each backward: it gathers again what is whole now."""
        whole = [group for group in self.groups if group.is_unsharded]

        def gather() -> None:
            for group in whole:
                group.module.unshard()

        return gather

    @contextmanager
    def reducing_sums(self) -> Iterator[None]:
        """Inside, the backward forms sums. FSDP also reduces those of parameters that this process did not use.

        Raises ValueError at the end if a sum was not reduced.
        """
        before = [(group, group.reduces_unused) for group in self.groups]
        for group in self.groups:
            group.reduces_unused = True
        try:
            yield
        finally:
            for group, reduced in before:
                group.reduces_unused = reduced
            left = [whole for whole in self._whole.values() if whole.grad is not None]
            for whole in left:
                whole.grad = None
        if left:
            raise ValueError(
                "FSDP reduced a module's gradients before the clipped sum of one of its parameters was complete, which "
                "is lost (the backward reached a part of the module only after its inputs); shard a larger module, in "
                "which that part depends on the inputs or which has no inputs with gradients"
            )

    def refuse_unsynchronised(self) -> None:
        """Raise ValueError if FSDP would not reduce the gradients of the next backward."""
        if not all(group.reduces for group in self.groups):
            raise ValueError(
                "set_requires_gradient_sync(False) keeps whole gradients, of which the sums would not be complete when "
                "the next backward clips; leave it True: each backward adds its sums to the shards"
            )

    # What is refused.

    def refusals(self, model: nn.Module, *, passes: str | int, per_layer: bool) -> Iterator[Refusal]:
        """What cannot be clipped exactly while it is sharded."""
        yield from self._foreign(model)
        if not self.groups:
            return
        if passes == "direct" or (passes == 1 and not per_layer):
            yield Refusal(
                "the model",
                "",
                f"is sharded by FSDP, which reduces gradients before passes={passes!r} has formed the clipped sums",
                'give passes="auto", which takes 2',
            )
        names = {module: name or "the model" for name, module in model.named_modules()}
        seen: dict[int, str] = {}
        for group in self.groups:
            name = names[group.module]
            yield from _policies(group, name)
            for each in group.parameters():
                if seen.setdefault(each.origin, name) != name:
                    yield Refusal(
                        name,
                        "",
                        f"shares a parameter with {seen[each.origin]}, and FSDP shards each of the two on its own",
                        "shard both in one call, fully_shard([one, other]), or leave both to the fully_shard of a "
                        "module around them",
                    )

    def _foreign(self, model: nn.Module) -> Iterator[Refusal]:
        """DTensors of tensor parallelism, or of anything else than `fully_shard`."""
        managed = {id(each.shard): each for group in self.groups for each in group.parameters()}
        managed |= {id(each.whole): each for each in list(managed.values())}
        for name, parameter in model.named_parameters():
            known = managed.get(id(parameter))
            if (is_sharded(parameter) and known is None) or (known is not None and known.is_dtensor):
                yield Refusal(
                    name,
                    "",
                    "is sharded over processes by something else than fully_shard (tensor parallelism), so its norms "
                    "would not be exact",
                    "give an unsharded model, or shard it by torch.distributed.fsdp.fully_shard alone",
                )


def refuse_sharded(model: nn.Module, name: str) -> None:
    """Raise ValueError for a sharded model, of which `name` needs a copy or whole parameters."""
    if internals.fsdp_groups(model):
        raise ValueError(f"{name} needs whole parameters, but the model is sharded; call it before fully_shard")


def _policies(group: FsdpGroup, name: str) -> Iterator[Refusal]:
    """Options of `fully_shard` under which sums would be rounded or incomplete."""
    trained = any(each.shard.requires_grad for each in group.parameters())
    low = [str(dtype) for dtype in group.dtypes if dtype in LOW_PRECISION]
    kind = class_of(group.module).__name__
    if trained and low:
        yield Refusal(
            name,
            kind,
            f"has a MixedPrecisionPolicy with {low[0]}, to which FSDP would round the clipped sums",
            "leave param_dtype and reduce_dtype at None, and compute in that dtype by torch.autocast",
        )
    if group.mesh_size != process_count():
        yield Refusal(
            name,
            kind,
            f"is not sharded over all {process_count()} processes in one dimension, so that FSDP would sum over a part "
            f"of them or average copies",
            "give fully_shard a mesh of one dimension with all processes, which is its default",
        )
    if group.reshards_to_fewer:
        yield Refusal(
            name,
            kind,
            "has a number as reshard_after_forward, after which neither copy of its parameters is registered",
            "give reshard_after_forward=True or False",
        )
