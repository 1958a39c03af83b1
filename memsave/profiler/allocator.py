"""What the allocator took while a step ran: the second number, beside the recorder's live bytes.

The recorder counts the bytes of tensors that a program can hold. The allocator also hands out what an operator needs
inside itself, the workspace of a convolution above all, and no recorder of tensors can see that. The number here is
*above the start*: the memory that existed before the step is not in it, so it stands beside
`report.peak_bytes - report.start_bytes`.

- CPU: the profiler's memory events (one per allocation and release by PyTorch's CPU allocator, with its address) are
  replayed in time order. In: tensors, and workspaces that operators take from this allocator. Out: rounding and caching
  by malloc, memory that a library takes by itself (MKL, oneDNN's own buffers, NumPy), Python objects, code. A step that
  releases older memory gets no credit for it, since the profiler does not know the size of what it did not see
  allocated; release old gradients before the measurement.
- CUDA: `torch.cuda.max_memory_allocated` after a reset, less what was allocated at the start. In: tensors and
  workspaces, each rounded up to the allocator's 512 bytes; older memory that the step releases is credited. Out: cached
  but unused segments, the CUDA context, libraries that call cudaMalloc themselves. The reset moves the process's own
  peak counter.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch._C._profiler import _EventType


def allocator_peak(step: Callable[[], object], *, device: torch.device | str = "cpu") -> int | None:
    """Run `step()` once and return the most bytes the allocator held above the start.

    None where no allocator answers: for a device other than CPU and CUDA (the step runs all the same), and for fake
    tensors, which allocate nothing.
    """
    where = torch.device(device)
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        step()
        return None
    if where.type == "cuda":
        return _cuda_peak(step, device=where)
    if where.type == "cpu":
        return _cpu_peak(step)
    step()
    return None


def _cpu_peak(step: Callable[[], object]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler otherwise writes two lines to the user's terminal
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:  # True: no warning
        result = step()
    # Held until here so that what the step returns counts as alive to the end, as in the CUDA measurement.
    del result
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    changes = [
        (event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size)
        for event in _all_events(profile.profiler.kineto_results.experimental_event_tree())
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu"
    ]
    changes.sort(key=lambda change: change[0])
    # By address: a release of what an earlier profile saw allocated is reported too, any other old release is not.
    sizes: dict[int, int] = {}
    live = peak = 0
    for _, address, size in changes:
        if size > 0:
            sizes[address] = size
            live += size
            peak = max(peak, live)
        else:
            live -= sizes.pop(address, 0)
    return peak


def _all_events(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _all_events(event.children)


def _cuda_peak(step: Callable[[], object], *, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
