"""What the process takes: a peak that can be started anew, and blocks that are given back."""

import subprocess
import sys

import pytest

from memsave.training.process import process_peak

pytestmark = pytest.mark.skipif(process_peak() is None, reason="no /proc/self/status here")

PROGRAM = """
import torch
from memsave.training.process import process_peak, restart_peak, return_freed_memory
MIB = 2**20
assert return_freed_memory()
blocks = [torch.ones(MIB // 4) for _ in range(300)]  # 1 MiB each, with a small one behind it, so that no heap shrinks
held = [bytearray(100) for _ in range(300)]
full = process_peak()
del blocks
restart_peak()
print((full - process_peak()) // MIB)
"""


def test_freed_blocks_go_back_and_the_peak_starts_anew():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 250  # of 300 MiB
