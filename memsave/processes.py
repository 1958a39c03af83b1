"""What training processes of one group need from each other: their number, sums of gradients, and shared decisions.

Imports torch alone. Without a process group of several processes, every function here returns at once what a single
process has. All processes of the group must call the same functions in the same order.

An error of one process would leave the others waiting. `together`, `on_main`, `map_shares` and `map_in_rounds` raise it
on every process.
"""

import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

T = TypeVar("T")
Item = TypeVar("Item")

LAUNCHERS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Environment variables in which torchrun, mpirun and srun give the number of processes."""
BUCKET_BYTES = 25 * 2**20
"""Gradients are summed in buckets of about this size, because many small messages take longer than few large ones."""


_alone = 0  # how many `alone` contexts are open


@contextmanager
def alone() -> Iterator[None]:
    """Within, this process acts as if it were the only one: what it does needs nothing from the others."""
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


@contextmanager
def together() -> Iterator[None]:
    """Raise on all processes the error that one of them raised within, with its traceback as a note.

    If several failed, each raises its own error, and the others that of the lowest rank. What runs within must not
    communicate, because a process that fails would not take part. An interrupt is raised by its own process alone.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        if process_count() == 1:
            raise
        failed = error
    if any_process(failed is not None):
        first = next(each for each in gather(portable(failed)) if each is not None)
        raise pickle.loads(first) if failed is None else failed


def portable(error: Exception | None) -> bytes | None:
    """The error in bytes for another process, with its traceback as a note; as a RuntimeError if it cannot be sent."""
    if error is None:
        return None
    note = f"in process {process_rank()}:\n{''.join(traceback.format_exception(error))}"
    sent: Exception = RuntimeError(f"{type(error).__name__}: {error}")
    with suppress(Exception):
        sent = pickle.loads(pickle.dumps(error))
    sent.add_note(note)
    return pickle.dumps(sent)


def on_main(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call the function on rank 0 alone; returns what it returned, on every process, or raises its error on all."""
    found: Any = None
    if process_count() == 1:
        return function(*args, **kwargs)
    with together():
        if process_rank() == 0:
            with alone():
                found = function(*args, **kwargs)
    return broadcast(found)


@contextmanager
def main_first() -> Iterator[None]:
    """Let one process of each machine run what is within, alone, before the others, which find what it has cached."""
    first = process_count() == 1 or int(os.environ.get("LOCAL_RANK", process_rank())) == 0
    if not first:
        with together():
            pass
    with together(), alone():
        yield
    if first:
        with together():
            pass


def process_count() -> int:
    """The number of processes in the default group; 1 without a group."""
    return distributed.get_world_size() if _has_group() else 1


def group_size() -> int:
    """The number of processes in the default group, also within `alone`."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def process_rank() -> int:
    """The rank of this process in the default group; 0 without a group."""
    return distributed.get_rank() if _has_group() else 0


def own_seed(seed: int) -> int:
    """A seed for what must differ between the processes; in rank 0, and without a group, it is `seed`."""
    return seed + 1_000_003 * process_rank()


def without_group() -> str | None:
    """The beginning of an error message if a launcher started several processes that have no group; otherwise None."""
    if distributed.is_available() and distributed.is_initialized():
        return None
    for name in LAUNCHERS:
        number = os.environ.get(name, "")
        if number.isdigit() and int(number) > 1:
            return f"this process is one of several ({name}={number})"
    return None


def agree(*numbers: int) -> bool:
    """Whether all processes have the same numbers."""
    return _reduced([*numbers, *(-each for each in numbers)], distributed.ReduceOp.MAX) == [
        *numbers,
        *(-each for each in numbers),
    ]


def share(items: Sequence[T]) -> list[T]:
    """The items that this process takes: every W-th one, beginning with the number of its rank."""
    return list(items[process_rank() :: process_count()])


def gather_shares(mine: Sequence[T]) -> list[T]:
    """The results for all items, in their order, on every process; `mine`: the results for the items of `share`."""
    shares: list[Sequence[T]] = gather(list(mine))
    count = len(shares)
    total = sum(map(len, shares))
    return [shares[number % count][number // count] for number in range(total)]


def map_shares(function: Callable[[Item], T], items: Sequence[Item]) -> list[T]:
    """[function(item) of each item], in their order, on every process; each process calls it for its share, `alone`.

    Raises the error of any process on every process; see `together`.
    """
    own = share(items)
    mine: list[T] = []
    with together(), alone():
        mine += map(function, own)
    return gather_shares(mine)


def map_in_rounds(function: Callable[[Item], T], items: Sequence[Item]) -> Iterator[T]:
    """Yield function(item) of each item, in their order, on every process; each process calls it once per round.

    If some items raise an exception, the results before the first one come first, and then every process raises it.
    """
    count, rank = process_count(), process_rank()
    for first in range(0, len(items), count):
        mine: list[T] = []
        error: Exception | None = None
        try:
            with alone():
                mine += map(function, items[first : first + count][rank : rank + 1])
        except Exception as found:
            if count == 1:
                raise
            error = found
        for other, (results, failed) in enumerate(gather((mine, portable(error)))):
            if failed is not None:
                raise pickle.loads(failed) if error is None or other != rank else error
            yield from results


def gather(value: T) -> list[T]:
    """The value of each process, by rank, on every process."""
    if process_count() == 1 or _is_pretended():
        return [value] * process_count()
    found: list[Any] = [None] * process_count()
    distributed.all_gather_object(found, value)
    return found


def received(value: T) -> Iterator[T]:
    """Yield the value of each process on rank 0, by rank; it holds one at a time. Other processes send, yield nothing.

    Rank 0 must take all of them: a process waits until its value has been received.
    """
    if process_rank() != 0:
        distributed.send_object_list([value], dst=0, device=_device())
        return
    yield value
    for rank in range(1, process_count()):
        content: list[Any] = [None]
        distributed.recv_object_list(content, src=rank, device=_device())
        yield content.pop()


def broadcast_model(model: nn.Module) -> None:
    """Give the parameters and buffers of rank 0 to all processes."""
    for tensor in [*model.parameters(), *model.buffers()]:
        distributed.broadcast(tensor.detach(), src=0)


def broadcast(value: T) -> T:
    """The value of rank 0."""
    if process_count() == 1 or _is_pretended():
        return value
    content: list[Any] = [value if process_rank() == 0 else None]
    distributed.broadcast_object_list(content, src=0)
    return content[0]


def wait_for_all() -> None:
    """Return when every process has called it."""
    gather(None)


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process."""
    return maximum(int(flag)) > 0


def maximum(number: int) -> int:
    """The largest of the processes' numbers."""
    return _reduced([number], distributed.ReduceOp.MAX)[0]


def totals(numbers: Sequence[int]) -> list[int]:
    """The sums over the processes, number by number."""
    return _reduced(list(numbers), distributed.ReduceOp.SUM)


def sums(numbers: Sequence[float]) -> list[float]:
    """The sums over the processes in float64, number by number."""
    return _reduced(list(numbers), distributed.ReduceOp.SUM, dtype=torch.float64)


def _reduced(numbers: list[Any], operation: Any, *, dtype: torch.dtype = torch.int64) -> list[Any]:
    if process_count() == 1:
        return numbers
    if _is_pretended():
        return [process_count() * each for each in numbers] if operation == distributed.ReduceOp.SUM else numbers
    content = torch.tensor(numbers, dtype=dtype, device=_device())
    distributed.all_reduce(content, operation)
    return content.tolist()


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each `.grad` by its sum over all processes; a missing one counts as zero.

    Gradients of parameters that FSDP shards stay as they are: FSDP has summed them. The sums are formed in the dtype of
    the gradients.
    """
    if process_count() == 1:
        return
    whole = [p for p in parameters if p.requires_grad and not is_sharded(p)]
    for parameter in whole:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([p.grad for p in whole if p.grad is not None]):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            distributed.all_reduce(bucket[0])
            continue
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        distributed.all_reduce(flat)
        for grad, total in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(total.view_as(grad))
        del flat, total  # before the next bucket is put together


def _buckets(gradients: list[Tensor]) -> Iterable[list[Tensor]]:
    """Gradients of one dtype and device, together of at most about BUCKET_BYTES."""
    waiting: list[Tensor] = []
    size = 0
    for grad in gradients:
        own = grad.numel() * grad.element_size()
        same = not waiting or (waiting[0].dtype, waiting[0].device) == (grad.dtype, grad.device)
        if waiting and (not same or size + own > BUCKET_BYTES):
            yield waiting
            waiting, size = [], 0
        waiting.append(grad)
        size += own
    if waiting:
        yield waiting


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of the tensor, as under `fully_shard`."""
    return "DTensor" in (type(tensor).__name__, type(tensor.data).__name__)


def local_part(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds; any other tensor itself."""
    found: Any = tensor
    return found.to_local() if is_sharded(tensor) else tensor


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on the module itself."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # if nothing has imported it, no module can be one of its own
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def class_of(module: nn.Module) -> type[nn.Module]:
    """The module's class; before `fully_shard`, which puts a subclass of its own in its place."""
    kinds = type(module).__mro__
    if not is_fully_sharded(module):
        return kinds[0]
    return kinds[1 + max(number for number, kind in enumerate(kinds) if kind.__name__ == "FSDPModule")]


def _has_group() -> bool:
    return not _alone and distributed.is_available() and distributed.is_initialized()


def _is_pretended() -> bool:
    """Whether the group only pretends several processes, to plan for them: all have what this one has."""
    return distributed.get_backend() == "fake"


def _device() -> torch.device:
    """A device on which the group can reduce a small tensor."""
    backend = str(distributed.get_backend_config())
    return torch.device("cpu" if "cpu" in backend or "gloo" in backend else "cuda")
