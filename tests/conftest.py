"""One thread a process, set before torch is loaded: tensors are small here, and the tests run side by side."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
