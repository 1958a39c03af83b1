"""`SmallModel`: a small language model that is pretrained once on generated public text, and cached."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from memsave.config import option
from memsave.config.schema import OptimizerConfig, TrainerConfig
from memsave.data.cache import cached_folder
from memsave.progress import Progress
from memsave.tasks.language.pretrained import LanguageModel, Purpose, load_pretrained
from memsave.training.loop import make_state, run_steps
from memsave.training.task import Task

VERSION = 1  # increase it when pretraining changes, so that cached models are not used


@dataclass
class SmallModel(LanguageModel):
    """The base of the small models. A subclass implements `pretrained`, and sets its own defaults."""

    warmup_steps: ClassVar[int] = 20
    beta: ClassVar[float] = 0.99
    """Second beta of AdamW; few steps need a shorter average of the squares than usual."""
    layers: int = option(3, least=1)
    """Transformer layers."""
    heads: int = option(4, least=1)
    """Attention heads per layer."""
    width: int = option(128, least=1)
    """Size of the hidden states."""
    vocabulary: int = option(2048, least=300)
    """Largest vocabulary of the tokenizer."""
    positions: int = option(160, least=1)
    """Maximum number of tokens."""
    steps: int = option(650, least=1)
    """Steps of pretraining."""
    batch_size: int = option(32, least=1)
    """Batch size of pretraining."""
    lr: float = 4e-3
    """Learning rate of pretraining."""
    seed: int = 0
    """Seed of the initial weights and of pretraining."""
    cache: str | None = None
    """Folder of the pretrained model ($MEMSAVE_CACHE or ~/.cache/memsave)."""

    def pretrained(self, *, progress: Progress) -> tuple[nn.Module, Any]:
        """(the model after pretraining, its tokenizer)."""
        raise NotImplementedError(f"{type(self).__name__} is not pretrained")

    def load(self, purpose: Purpose, *, progress: Progress) -> tuple[nn.Module, Any]:
        """(the pretrained model, its tokenizer); pretrains it first if the cache does not have it."""
        return load_pretrained(str(self.folder(progress=progress)), purpose)

    def folder(self, *, progress: Progress) -> Path:
        """The cached folder of the pretrained model; pretrains it first if the cache does not have it."""

        def make(folder: Path) -> None:
            from transformers.utils import logging

            logging.disable_progress_bar()
            model: Any
            model, tokenizer = self.pretrained(progress=progress)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        name, settings = self.kind.replace("_", "-"), {"version": VERSION, **self.settings()}
        return cached_folder(self.cache, name=name, settings=settings, make=make)

    def settings(self) -> dict[str, Any]:
        """The keys on which the pretrained model depends."""
        return {key: value for key, value in asdict(self).items() if key not in ("cache", "kind", "name", "random")}

    def trainer(self) -> TrainerConfig:
        """The config of pretraining."""
        optimizer = OptimizerConfig(lr=self.lr, weight_decay=0.01, schedule="cosine", warmup_steps=self.warmup_steps)
        return TrainerConfig(steps=self.steps, batch_size=self.batch_size, optimizer=optimizer, seed=self.seed)

    def train(self, model: nn.Module, task: Task, *, progress: Progress) -> None:
        """Take the steps of pretraining."""
        trainer = self.trainer()
        state = make_state(model, trainer)
        for group in state.optimizer.param_groups:
            group["betas"] = (0.9, self.beta)
        with progress.bar(self.steps) as bar:
            for done in run_steps(state, task, trainer):
                bar.advance(f"loss {done.loss:.3f}")
