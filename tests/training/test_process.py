"""Memory of the process: the peak can be reset, and freed blocks are returned to the system."""

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
torch.ones(8 * MIB // 4)  # after it is freed, malloc keeps blocks up to this size on its heap by default
blocks, held = [], []
for _ in range(300 // {size}):
    blocks.append(torch.ones({size} * MIB // 4))
    held.append(bytearray(1000))  # a small block after each prevents the heap from shrinking
full = process.process_bytes()
assert full <= process.process_peak()
del blocks
process.reset_process_peak()
print((full - process.process_peak()) // MIB, (full - process.process_bytes()) // MIB)
"""


def given_back(setting, size):
    """(MiB of 300 freed in blocks of this size and returned: in the peak after its reset, and now)."""
    program = PROGRAM.format(setting=setting, size=size)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return [int(each) for each in done.stdout.split()]


def test_freed_blocks_are_returned_and_the_peak_is_reset():
    assert min(given_back("return_freed_memory", 1)) > 250


def test_freed_blocks_are_kept():
    assert max(given_back("keep_freed_memory", 100)) < 50  # malloc returns these by default
