"""memsave: train models that do not fit.

`memsave.reversible` rebuilds activations instead of storing them and `memsave.profiler` counts every byte that
lives; both meet a model in autograd alone. `memsave.load` gives the model of a finished run. Importing memsave costs
what importing torch costs: MONAI, matplotlib and other heavy libraries are imported where they are used.
"""

from typing import TYPE_CHECKING, Any

from memsave.startup import quit_at_interrupt

if TYPE_CHECKING:
    from pathlib import Path

from memsave._version import __version__ as __version__

__all__ = ["load"]

quit_at_interrupt()


def load(folder: "str | Path") -> Any:
    """The trained model in a run's folder, or in its `model/` copied anywhere, in eval mode on the CPU.

    A U-Net comes as `memsave.models.ReversibleUNet3d`; its `config` (a `UNetConfig`) names the modalities
    of its input channels, the regions of its output channels, and how volumes are prepared.
    A language model comes as that of transformers, and `AutoTokenizer.from_pretrained` loads its tokenizer from
    `model/`; `prompt.json` there says how it is prompted. Raises `memsave.config.ConfigError` where the folder
    holds no model.
    """
    from memsave.tasks.loading import load_model

    return load_model(folder)
