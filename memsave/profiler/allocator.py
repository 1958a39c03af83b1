"""The peak of the allocator during a step: a second number beside the live bytes of the recorder.

The recorder counts the bytes of tensors. The allocator also provides the memory that an operator needs internally, most
importantly the workspace of a convolution, which a recorder of tensors cannot see. The peak is measured *above the
start*: memory that existed before the step is not included, so compare it with `report.peak_bytes -
report.start_bytes`.

- CPU: replays the profiler's memory events (one per allocation and release by PyTorch's CPU allocator, with its
  address) in time order. Included: tensors, and workspaces that operators take from this allocator. Not included:
  rounding and caching by malloc, memory that a library allocates itself (MKL, oneDNN's buffers, NumPy), Python objects,
  code. If the step releases older memory, the peak is not reduced, because the profiler does not know the size of an
  allocation that it did not record; release old gradients before the measurement.
- CUDA: `torch.cuda.max_memory_allocated` after a reset, minus the bytes allocated at the start. Included: tensors and
  workspaces, each rounded up to 512 bytes by the allocator; the release of older memory reduces the number. Not
  included: cached but unused segments, the CUDA context, libraries that call cudaMalloc themselves. The reset changes
  the peak counter of the process.
"""

import os
from collections.abc import Callable

import torch

from memsave.profiler._torch_internals import allocations, is_fake_mode_active


def allocator_peak(step: Callable[[], object], *, device: torch.device | str = "cpu") -> int | None:
    """Run `step()` once and return the most bytes the allocator held above the start.

    Returns None on a device other than CPU and CUDA, and under FakeTensorMode, which allocates nothing; the step runs
    in these cases, too.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda") or is_fake_mode_active():
        step()
        return None
    return _cpu_peak(step) if device.type == "cpu" else _cuda_peak(step, device=device)


def _cpu_peak(step: Callable[[], object]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler prints two lines
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:  # True: no warning
        result = step()
    del result  # only now, so that the step's result is alive until its end, as in the CUDA measurement
    # Sizes by address, because the profiler also reports releases of memory that an earlier profile saw allocated.
    sizes: dict[int, int] = {}
    live = peak = 0
    for _, address, size in sorted(allocations(profile), key=lambda event: event[0]):
        if size > 0:
            sizes[address] = size
            live += size
            peak = max(peak, live)
        else:
            live -= sizes.pop(address, 0)
    return peak


def _cuda_peak(step: Callable[[], object], *, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
