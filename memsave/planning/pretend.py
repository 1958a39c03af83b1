"""Plans for several processes without having them: this process is rank 0 of a group that sends nothing.

PyTorch's process group "fake" returns from each collective at once, with the content of its output undefined. On fake
tensors, which have no content, a step then allocates what a real process would. Rank 0 holds the largest shards.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from typing import Any, TypeVar

import torch
from torch import distributed

from memsave.config import Config
from memsave.processes import LAUNCHERS, group_size
from memsave.tf32 import tf32

T = TypeVar("T")

_mesh: Any = None


def planned_processes(config: Config) -> int:
    """The number of processes to plan for: those of this run, or those that a plan asks for."""
    return group_size() if group_size() > 1 else config.trainer.processes or 1


@contextmanager
def pretended_processes(count: int, device: torch.device) -> Iterator[None]:
    """Within, this process is rank 0 of a pretended group of `count` processes; nothing happens for one process."""
    global _mesh
    if count == 1:
        yield
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore  # PyTorch's only home of the fake group

    distributed.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        _mesh = init_device_mesh(device.type, (count,))  # it reads values, so it is made outside of fake tensors
        yield
    finally:
        _mesh = None
        distributed.destroy_process_group()


def pretended_mesh() -> Any:
    """The mesh of the pretended processes."""
    return _mesh


def plan_alone(function: Callable[..., T], config: Config, device: torch.device, **kwargs: Any) -> T:
    """`function(config, device, **kwargs)` in the pretended group of the processes that the config is planned for.

    A process of a real group can't pretend another one, so that a new process plans for it.
    """
    count = planned_processes(config)
    call = partial(_call, function, config, device, count, kwargs)
    if group_size() == 1:
        return call()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_without_launcher) as pool:
        return pool.submit(call).result()


def _call(function: Callable[..., T], config: Config, device: torch.device, count: int, kwargs: dict[str, Any]) -> T:
    with tf32(allowed=config.trainer.tf32), pretended_processes(count, device):  # also in a new process
        return function(config, device, **kwargs)


def _without_launcher() -> None:
    """Let a new process not look like one of several that have no group."""
    for name in (*LAUNCHERS, "RANK", "LOCAL_RANK"):
        os.environ.pop(name, None)
