"""`model=small_gpt2` and `model=rev_gpt2`: small models that are pretrained once on generated public text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from memsave.config import option, register
from memsave.data.text.calls import CallsData, public_dialogs
from memsave.data.text.config import VisitsData
from memsave.data.text.visits import public_records
from memsave.progress import Progress
from memsave.tasks.language.dialog import DialogTask
from memsave.tasks.language.generation import Generation
from memsave.tasks.language.small_model import SmallModel
from memsave.training.task import Task

END, PAD = "<|endoftext|>", "<|pad|>"


@register("model", "small_gpt2")
@dataclass
class SmallGPT2(SmallModel):
    """A small GPT-2, pretrained once on generated public text and cached."""

    kind: str = "small_gpt2"
    name: str = "small_gpt2"
    corpus: str = option("tables", choices=("tables", "dialogs"))
    """Generated public text for pretraining: tables with sentences, or telephone calls."""
    records: int = option(20000, least=1)
    """Generated public records for pretraining."""

    def pretrained(self, *, progress: Progress) -> tuple[nn.Module, Any]:
        """(the model after pretraining on the corpus, its tokenizer)."""
        corpus = CORPORA[self.corpus](self)
        tokenizer = train_tokenizer(corpus.texts, size=self.vocabulary)
        model, task = small_gpt2(self, tokenizer), corpus.task(tokenizer)
        progress.say(f"pretraining model={self.kind} on {task.size} generated public {self.corpus}; it is then cached")
        if cut := task.counts["cut_examples"]:
            progress.say(f"  {cut} of them are cut to model.positions={self.positions} tokens")
        self.train(model, task, progress=progress)
        return model, tokenizer

    def settings(self) -> dict[str, Any]:
        """The keys on which the pretrained model depends; folders of older versions have tables and lack the corpus."""
        found = super().settings()
        if self.corpus == "tables":
            del found["corpus"]
        return found

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
    options: dict[str, Any] = {"data": data, "trainer": config.trainer(), "device": torch.device("cpu")}
    texts = [f"{each.prompt} {each.completion}" for each in records]
    return Corpus(texts, lambda tokenizer: Generation(records, [], tokenizer, **options))


def _dialogs(config: SmallGPT2) -> Corpus:
    dialogs = public_dialogs(config.records, seed=config.seed)
    data = CallsData(max_length=config.positions)
    options: dict[str, Any] = {"data": data, "trainer": config.trainer(), "device": torch.device("cpu")}
    texts = [" ".join(f"{role}: {content}" for role, content in each.messages) for each in dialogs]
    return Corpus(texts, lambda tokenizer: DialogTask(dialogs, [], tokenizer, **options))


CORPORA: dict[str, Callable[[SmallGPT2], Corpus]] = {"tables": _tables, "dialogs": _dialogs}
