"""memsave: train models that do not fit in memory.

The names of `memsave.__all__` are imported at first use: `import memsave` imports neither torch nor any other library.
Names that are not listed there are documented in their own packages, see docs/api.md.
"""

from typing import TYPE_CHECKING, Any

from memsave._version import __version__ as __version__
from memsave.startup import quit_at_interrupt

quit_at_interrupt()  # before any import that takes time

if TYPE_CHECKING:
    from pathlib import Path

    from memsave.ghost import GhostClipper, linear_cross_entropy, register_rule
    from memsave.ghost import verify as verify_clipping
    from memsave.models import causal_lm_losses
    from memsave.offload import ActivationOffload, offload_optimizer
    from memsave.planning.any_model import memory_report
    from memsave.privacy import Mechanism, PrivateGradients
    from memsave.profiler import MemoryRecorder, largest, memory_page
    from memsave.reversible import AdditiveCoupling, ReversibleSequence, from_residual, make_reversible
    from memsave.reversible import verify as verify_inversion

__all__ = [
    "ActivationOffload",
    "AdditiveCoupling",
    "GhostClipper",
    "Mechanism",
    "MemoryRecorder",
    "PrivateGradients",
    "ReversibleSequence",
    "causal_lm_losses",
    "from_residual",
    "largest",
    "linear_cross_entropy",
    "load",
    "make_reversible",
    "memory_page",
    "memory_report",
    "offload_optimizer",
    "register_rule",
    "verify_clipping",
    "verify_inversion",
]

_SOURCES = {  # name: (module, name in that module)
    "ActivationOffload": ("memsave.offload", "ActivationOffload"),
    "AdditiveCoupling": ("memsave.reversible", "AdditiveCoupling"),
    "GhostClipper": ("memsave.ghost", "GhostClipper"),
    "Mechanism": ("memsave.privacy", "Mechanism"),
    "MemoryRecorder": ("memsave.profiler", "MemoryRecorder"),
    "PrivateGradients": ("memsave.privacy", "PrivateGradients"),
    "ReversibleSequence": ("memsave.reversible", "ReversibleSequence"),
    "causal_lm_losses": ("memsave.models", "causal_lm_losses"),
    "from_residual": ("memsave.reversible", "from_residual"),
    "largest": ("memsave.profiler", "largest"),
    "linear_cross_entropy": ("memsave.ghost", "linear_cross_entropy"),
    "make_reversible": ("memsave.reversible", "make_reversible"),
    "memory_page": ("memsave.profiler", "memory_page"),
    "memory_report": ("memsave.planning.any_model", "memory_report"),
    "offload_optimizer": ("memsave.offload", "offload_optimizer"),
    "register_rule": ("memsave.ghost", "register_rule"),
    "verify_clipping": ("memsave.ghost", "verify"),
    "verify_inversion": ("memsave.reversible", "verify"),
}


def load(folder: "str | Path") -> Any:
    """Load the trained model from a run's folder, its `model/` or a copy of `model/`; in eval mode, on the CPU.

    A segmentation run gives a `memsave.models.ReversibleUNet3d`. Its `config` (a `UNetConfig`) names the modalities of
    the input channels, the regions of the output channels, and the preparation of volumes.
    A language-model run gives a model of transformers. `AutoTokenizer.from_pretrained` loads its tokenizer from
    `model/`, and `prompt.json` there describes its prompts. Raises `memsave.config.ConfigError` if the folder holds no
    model.
    """
    from memsave.tasks.loading import load_model

    return load_model(folder)


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562)."""
    if name not in _SOURCES:
        raise AttributeError(f"module 'memsave' has no attribute {name!r}")
    from importlib import import_module

    module, source_name = _SOURCES[name]
    globals()[name] = value = getattr(import_module(module), source_name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
