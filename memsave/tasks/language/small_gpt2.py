"""`model=small_gpt2` and `model=rev_gpt2`: small models that are pretrained once on generated public text."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from memsave.config import option, register
from memsave.config.schema import OptimizerConfig, TrainerConfig
from memsave.data.cache import cached_folder
from memsave.data.text.calls import CallsData, public_dialogs
from memsave.data.text.config import VisitsData
from memsave.data.text.visits import public_records
from memsave.progress import Progress
from memsave.tasks.language.dialog import DialogTask
from memsave.tasks.language.generation import Generation
from memsave.tasks.language.pretrained import LanguageModel, Purpose, load_pretrained
from memsave.training.loop import make_state, run_steps
from memsave.training.task import Task

VERSION = 1  # increase it when pretraining changes, so that cached models are not used
OTHER_KEYS = ("cache", "kind", "name", "random")  # the pretrained model does not depend on them
END, PAD = "<|endoftext|>", "<|pad|>"


@register("model", "small_gpt2")
@dataclass
class SmallGPT2(LanguageModel):
    """A small GPT-2, pretrained once on generated public text and cached."""

    kind: str = "small_gpt2"
    name: str = "small_gpt2"
    corpus: str = option("tables", choices=("tables", "dialogs"))
    """Generated public text for pretraining: tables with sentences, or telephone calls."""
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
    records: int = option(20000, least=1)
    """Generated public records for pretraining."""
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

    def load(self, purpose: Purpose, *, progress: Progress) -> tuple[nn.Module, Any]:
        """(the pretrained model, its tokenizer); pretrains it first if the cache does not have it."""
        return load_pretrained(str(pretrained_small_gpt2(self, progress=progress)), purpose)

    def architecture(self) -> Any:
        """The architecture with the largest possible vocabulary."""
        return self.sizes(vocabulary=self.vocabulary, end=0, pad=1)

    def sizes(self, *, vocabulary: int, end: int, pad: int) -> Any:
        """The transformers config, without dropout: the noise of private training regularises enough."""
        from transformers import GPT2Config

        return GPT2Config(**self._sizes(vocabulary, end, pad), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)

    def _sizes(self, vocabulary: int, end: int, pad: int) -> dict[str, Any]:
        return {
            "vocab_size": vocabulary,
            "bos_token_id": end,
            "eos_token_id": end,
            "pad_token_id": pad,
            "max_position_embeddings": self.positions,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
        }


@register("model", "rev_gpt2")
@dataclass
class RevGPT2(SmallGPT2):
    """The reversible `memsave.models.rev_gpt2.RevGPT2`, pretrained and cached like small_gpt2."""

    reversible: ClassVar[bool] = True
    kind: str = "rev_gpt2"
    name: str = "rev_gpt2"

    def sizes(self, *, vocabulary: int, end: int, pad: int) -> Any:
        """The reversible architecture."""
        from memsave.models.rev_gpt2 import RevGPT2Config

        return RevGPT2Config(**self._sizes(vocabulary, end, pad))


def pretrained_small_gpt2(config: SmallGPT2, *, progress: Progress) -> Path:
    """The cached folder of the pretrained model; pretrains it first if the cache does not have it."""
    unused = (*OTHER_KEYS, "corpus") if config.corpus == "tables" else OTHER_KEYS  # older caches lack the corpus
    settings = {key: value for key, value in asdict(config).items() if key not in unused}

    def make(folder: Path) -> None:
        from transformers.utils import logging

        logging.disable_progress_bar()
        corpus = CORPORA[config.corpus](config)
        tokenizer = train_tokenizer(corpus.texts, size=config.vocabulary)
        model = small_gpt2(config, tokenizer)
        _pretrain(model, corpus.task(tokenizer), config, progress=progress)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return cached_folder(
        config.cache, name=config.kind.replace("_", "-"), settings={"version": VERSION, **settings}, make=make
    )


def small_gpt2(config: SmallGPT2, tokenizer: Any) -> Any:
    """The model with random weights."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        ends = {"end": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
        return AutoModelForCausalLM.from_config(config.sizes(vocabulary=len(tokenizer), **ends))


def train_tokenizer(texts: Sequence[str], *, size: int) -> Any:
    """A byte-level BPE tokenizer. Train it only on public text: its vocabulary contains words of that text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=PAD)


@dataclass(frozen=True)
class Corpus:
    """Public text for pretraining."""

    texts: list[str]
    task: Callable[[Any], Task]
    """The task of pretraining for a tokenizer."""


def _tables(config: SmallGPT2) -> Corpus:
    records = public_records(config.records, seed=config.seed)
    data = VisitsData(max_length=config.positions)
    options: dict[str, Any] = {"data": data, "trainer": _trainer(config), "device": torch.device("cpu")}
    texts = [f"{each.prompt} {each.completion}" for each in records]
    return Corpus(texts, lambda tokenizer: Generation(records, [], tokenizer, **options))


def _dialogs(config: SmallGPT2) -> Corpus:
    dialogs = public_dialogs(config.records, seed=config.seed)
    data = CallsData(max_length=config.positions)
    options: dict[str, Any] = {"data": data, "trainer": _trainer(config), "device": torch.device("cpu")}
    texts = [" ".join(f"{role}: {content}" for role, content in each.messages) for each in dialogs]
    return Corpus(texts, lambda tokenizer: DialogTask(dialogs, [], tokenizer, **options))


CORPORA: dict[str, Callable[[SmallGPT2], Corpus]] = {"tables": _tables, "dialogs": _dialogs}


def _trainer(config: SmallGPT2) -> TrainerConfig:
    optimizer = OptimizerConfig(lr=config.lr, weight_decay=0.01, schedule="cosine", warmup_steps=20)
    return TrainerConfig(steps=config.steps, batch_size=config.batch_size, optimizer=optimizer, seed=config.seed)


def _pretrain(model: nn.Module, task: Task, config: SmallGPT2, *, progress: Progress) -> None:
    trainer = _trainer(config)
    progress.say(f"pretraining model={config.kind} on {task.size} generated public {config.corpus}; it is then cached")
    if cut := task.counts["cut_examples"]:
        progress.say(f"  {cut} of them are cut to model.positions={config.positions} tokens")
    state = make_state(model, trainer)
    for group in state.optimizer.param_groups:
        group["betas"] = (0.9, 0.99)  # few steps need a shorter average of the squares
    with progress.bar(config.steps) as bar:
        for done in run_steps(state, task, trainer):
            bar.advance(f"loss {done.loss:.3f}")
