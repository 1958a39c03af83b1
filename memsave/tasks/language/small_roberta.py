"""`model=small_roberta`: a small masked language model that is pretrained once on generated public text."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memsave.config import option, register
from memsave.data.loader import Index
from memsave.data.text.collate import IGNORED, Tokens, collate
from memsave.data.text.feedback import VERDICTS, public_reviews
from memsave.progress import Progress
from memsave.tasks.language.small_model import SmallModel
from memsave.training.task import Batch

SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
VERSION = 3  # increase it when pretraining or its texts change, so that cached models are not used
INITIAL = 1.0  # standard deviation of the initial weights, times sqrt(width); with less, some seeds learn no mood
FIRST = 0.5  # share of the steps whose masks are at verdicts alone
MASKED = 0.2  # share of the tokens that are predicted; few steps learn more from more of them
REPLACED = 0.1  # share of the other tokens that are replaced by random ones


@register("model", "small_roberta")
@dataclass
class SmallRoberta(SmallModel):
    """A small RoBERTa, pretrained once as a masked language model on generated public text and cached."""

    warmup_steps: ClassVar[int] = 50
    beta: ClassVar[float] = 0.98
    kind: str = "small_roberta"
    name: str = "small_roberta"
    layers: int = option(2, least=1)
    """Transformer layers."""
    heads: int = option(2, least=1)
    """Attention heads per layer."""
    width: int = option(64, least=1)
    """Size of the hidden states."""
    vocabulary: int = option(900, least=300)
    """Largest vocabulary of the tokenizer."""
    texts: int = option(20000, least=1)
    """Generated public texts for pretraining."""
    steps: int = option(1000, least=1)
    """Steps of pretraining."""
    lr: float = 3e-3
    """Learning rate of pretraining."""

    def pretrained(self, *, progress: Progress) -> tuple[nn.Module, Any]:
        """(the model after masked language modelling, its tokenizer)."""
        texts = public_reviews(self.texts, seed=self.seed)
        tokenizer = train_masked_tokenizer(texts, size=self.vocabulary)
        model = small_roberta(self, vocabulary=len(tokenizer))
        first = round(FIRST * self.steps) * self.batch_size
        task: Any = MaskedTexts(texts, tokenizer, max_length=self.positions, first=first, seed=self.seed)
        progress.say(f"pretraining model={self.kind} on {len(texts)} generated public texts; it is then cached")
        self.train(model, task, progress=progress)
        return model, tokenizer

    def settings(self) -> dict[str, Any]:
        """The keys on which the pretrained model depends."""
        return {"version": VERSION, **{key: value for key, value in super().settings().items() if key != "head"}}

    def architecture(self) -> Any:
        """The architecture with the largest possible vocabulary, without dropout: the noise regularises enough."""
        return self.sizes(vocabulary=self.vocabulary)

    def sizes(self, *, vocabulary: int) -> Any:
        """The transformers config; the first positions belong to padding, as in every RoBERTa."""
        from transformers import RobertaConfig

        return RobertaConfig(
            vocab_size=vocabulary,
            max_position_embeddings=self.positions + 2,
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=INITIAL / self.width**0.5,
            bos_token_id=0,
            pad_token_id=1,
            eos_token_id=2,
        )


def small_roberta(config: SmallRoberta, *, vocabulary: int) -> Any:
    """The model with random weights."""
    from transformers import AutoModelForMaskedLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return AutoModelForMaskedLM.from_config(config.sizes(vocabulary=vocabulary))


def train_masked_tokenizer(texts: Sequence[str], *, size: int) -> Any:
    """A byte-level BPE tokenizer with RoBERTa's special tokens. Train it only on public text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    mask = AddedToken(SPECIAL["mask_token"], lstrip=True, special=True)  # it takes the space before it
    special: list[Any] = [each for each in SPECIAL.values() if each != SPECIAL["mask_token"]]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*special, mask], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = {name: (SPECIAL[name], list(SPECIAL.values()).index(SPECIAL[name])) for name in ("eos_token", "bos_token")}
    tokenizer.post_processor = processors.RobertaProcessing(
        sep=ends["eos_token"], cls_token=ends["bos_token"], add_prefix_space=False, trim_offsets=False
    )
    inputs = ["input_ids", "attention_mask"]
    names: dict[str, Any] = {**SPECIAL, "mask_token": mask, "cls_token": SPECIAL["bos_token"]}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **names, sep_token=SPECIAL["eos_token"], model_input_names=inputs
    )


class MaskedTexts:
    """Texts of which some tokens are replaced by the mask token and predicted; the masks depend on (seed, draw).

    The first texts have masks at their verdicts alone, such as the last word of "It was great.": from these a small
    model learns moods in few steps. Later, every second text has one of its masks there. A tenth of the other tokens
    are random ones, so that words that are rare in public text, and common in private text, say nothing about a mood.

    Args:
        texts: the texts.
        tokenizer: with a mask token.
        max_length: in tokens; the rest is cut.
        first: the number of draws with masks at verdicts alone.
        seed: of the masks.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Any, *, max_length: int, first: int, seed: int):
        words = [f" {word}" for verdicts in VERDICTS for word in verdicts]
        self.verdicts = {each[0] for each in tokenizer(words, add_special_tokens=False)["input_ids"]}
        found = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
        self.tokens: list[list[int]] = found
        self.tokenizer, self.first, self.seed = tokenizer, first, seed

    @property
    def size(self) -> int:
        """Number of texts."""
        return len(self.tokens)

    @property
    def fingerprint(self) -> str:
        """A digest of the tokens."""
        return hashlib.sha256(repr(self.tokens).encode()).hexdigest()[:16]

    def load(self, indices: Sequence[Index]) -> Batch:
        """Masked texts, with labels at their masks."""
        return collate([[self._masked(each)] for each in indices], pad=self.tokenizer.pad_token_id)

    def _masked(self, index: Index) -> Tokens:
        ids = list(self.tokens[index.example])
        generator = torch.Generator().manual_seed(self.seed * 10**9 + index.draw)
        order = (torch.randperm(len(ids) - 2, generator=generator) + 1).tolist()
        count = max(1, round(MASKED * len(order)))
        verdicts = [place for place in order if ids[place] in self.verdicts]
        if index.draw < self.first and verdicts:
            order, count = verdicts, len(verdicts)
        elif index.draw % 2:
            order.sort(key=lambda place: place not in verdicts)
        labels, predicted = [IGNORED] * len(ids), set(order[:count])
        draws = torch.rand(len(ids), generator=generator).tolist()
        others = torch.randint(len(SPECIAL), len(self.tokenizer), (len(ids),), generator=generator).tolist()
        for place in range(1, len(ids) - 1):
            if place in predicted:
                labels[place], ids[place] = ids[place], self.tokenizer.mask_token_id
            elif draws[place] < REPLACED:
                ids[place] = others[place]
        return Tokens(ids, labels)

    def place(self, batch: Batch) -> Batch:
        """The batch itself: pretraining runs on the CPU."""
        return batch

    def per_example_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B,): the mean cross-entropy over the masks of each text."""
        parts: Any = model
        hidden = parts.roberta(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]  # (B, T, d)
        is_masked = batch["labels"] != IGNORED  # (B, T)
        each = F.cross_entropy(parts.lm_head(hidden[is_masked]), batch["labels"][is_masked], reduction="none")
        total = each.new_zeros(len(hidden)).index_add(0, is_masked.nonzero()[:, 0], each)
        return total / is_masked.sum(1)
