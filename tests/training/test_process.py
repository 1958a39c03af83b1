"""What the process takes: a peak that can be started anew, and blocks that are given back."""

import subprocess
import sys

import pytest

from memsave.training.process import process_peak

pytestmark = pytest.mark.skipif(process_peak() is None, reason="no /proc/self/status here")

PROGRAM = """
import torch
from memsave.training import process
MIB = 2**20
assert process.{setting}()
torch.ones(8 * MIB // 4)  # once it is freed, malloc by itself puts blocks up to this size on its heap
blocks, held = [], []
for _ in range(300 // {size}):
    blocks.append(torch.ones({size} * MIB // 4))
    held.append(bytearray(1000))  # a small one behind each, so that no heap shrinks
full = process.process_bytes()
assert full <= process.process_peak()
del blocks
process.reset_process_peak()
print((full - process.process_peak()) // MIB, (full - process.process_bytes()) // MIB)
"""


def given_back(setting, size):
    """MiB of 300, in blocks of so many, that the process no longer has: since its peak was restarted, and now."""
    program = PROGRAM.format(setting=setting, size=size)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return [int(each) for each in done.stdout.split()]


def test_freed_blocks_go_back_and_the_peak_starts_anew():
    assert min(given_back("return_freed_memory", 1)) > 250


def test_freed_blocks_are_kept():
    assert max(given_back("keep_freed_memory", 100)) < 50  # which malloc by itself returns
