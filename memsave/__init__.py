"""memsave: train models that do not fit.

`memsave.reversible` rebuilds activations instead of storing them and `memsave.profiler` counts every byte that
lives; both meet a model in autograd alone. Importing memsave costs what importing torch costs: MONAI, matplotlib
and other heavy libraries are imported where they are used.
"""

from memsave.startup import quit_at_interrupt

__version__ = "0.1.0"

quit_at_interrupt()
