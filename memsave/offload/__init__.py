"""Keep activations and the optimizer's state in host memory: pinned for CUDA, a memory-mapped file for the CPU.

`ActivationOffload` moves what autograd saves for backward. `offload_optimizer` moves the state of an optimizer between
its steps. Both leave every number unchanged. A `MemoryRecorder` reports the bytes in host memory beside those of the
device.

Imports only torch.
"""

from memsave.offload.activations import ActivationOffload
from memsave.offload.optimizer import finish_copies, keep_state_offloaded, offload_optimizer

__all__ = ["ActivationOffload", "finish_copies", "keep_state_offloaded", "offload_optimizer"]
