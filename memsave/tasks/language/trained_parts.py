"""Adapters that train a part of a model's own parameters; `model/` then holds the whole model.

    adapter=bitfit     biases alone                                      Ben Zaken et al., 2021
    adapter=attention  attention layers alone
    adapter=frozen     everything except the embeddings or the head

These are the restrictions of full fine-tuning in the appendix of Li et al. (2022). The new head of a sequence
classifier always trains.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from memsave.config import ConfigError, option, register
from memsave.config.schema import AdapterConfig, ModelConfig
from memsave.tasks.language.pretrained import LanguageModel

CLASSIFIER, SEQ2SEQ, CAUSAL = "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM"
"""PEFT's names of tasks."""


@dataclass
class LanguageAdapter(AdapterConfig):
    """The base of the adapters of language models."""

    model_class: ClassVar[type[ModelConfig]] = LanguageModel


@register("adapter", "bitfit")
@dataclass
class BitFit(AdapterConfig):
    """Biases train, those of norms included; the new head of a classifier trains completely."""

    kind: str = "bitfit"

    def apply(self, model: nn.Module) -> nn.Module:
        """The model with all other parameters frozen."""
        found = {name for name, _ in model.named_parameters() if name.rpartition(".")[2].endswith("bias")}
        if not found:
            raise ConfigError(f"adapter=bitfit trains biases, and {type(model).__name__} has none; give adapter=lora")
        return train_only(model, found)


@register("adapter", "attention")
@dataclass
class AttentionOnly(LanguageAdapter):
    """Attention layers train, with the norms inside them; the new head of a classifier trains, too."""

    kind: str = "attention"

    def apply(self, model: nn.Module) -> nn.Module:
        """The model with all other parameters frozen."""
        layers = [name for name, module in model.named_modules() if is_attention(module)]
        if not layers:
            raise ConfigError(
                f"adapter=attention finds no module with Attention in the name of its class in {type(model).__name__}; "
                f"give adapter=lora with adapter.target_modules"
            )
        return train_only(model, {name for name, _ in model.named_parameters() if is_inside(name, layers)})


@register("adapter", "frozen")
@dataclass
class FrozenParts(LanguageAdapter):
    """All parameters train except those of some parts."""

    kind: str = "frozen"
    parts: list[str] = option(["embeddings"], choices=("embeddings", "head"))
    """embeddings: the tables of tokens, positions and token types; head: the layer that maps to the vocabulary. If the
    head is tied to the embedding, freezing either freezes both."""

    def validate(self) -> None:
        """Raise ConfigError without parts."""
        if not self.parts:
            raise ConfigError("adapter.parts is empty; give adapter.parts=[embeddings,head], or adapter=none")

    def apply(self, model: Any) -> nn.Module:
        """The model with the parts frozen."""
        frozen = []
        if "embeddings" in self.parts:
            attention = [name for name, module in model.named_modules() if is_attention(module)]
            named = [(name, each) for name, each in model.named_modules() if isinstance(each, nn.Embedding)]
            frozen += [each for name, each in named if not is_inside(name, attention)]
        if "head" in self.parts:
            head = model.get_output_embeddings()
            if head is None:
                raise ConfigError(
                    f"adapter.parts has head, and {type(model).__name__} has no head for the vocabulary; give "
                    f"adapter.parts=[embeddings]"
                )
            frozen.append(head)
        for module in frozen:
            module.requires_grad_(False)
        return model


def task_of(model: Any) -> str | None:
    """PEFT's name of the task of a model of transformers; None for masked language models and encoders."""
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        return CLASSIFIER
    if getattr(model.config, "is_encoder_decoder", False):
        return SEQ2SEQ
    return None if is_encoder(model) else CAUSAL


def is_encoder(model: Any) -> bool:
    """Whether every token attends to all others: the architecture has a masked language model, and is no decoder."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    return type(model.config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(model.config, "is_decoder", False)


def new_heads(model: Any) -> list[str]:
    """The modules that a sequence classifier adds to the pretrained model; none of other models."""
    if task_of(model) != CLASSIFIER:
        return []
    children = model.named_children()
    return [name for name, each in children if name != model.base_model_prefix and any(True for _ in each.parameters())]


def train_only(model: nn.Module, names: set[str]) -> nn.Module:
    """Freeze every parameter except these and those of the new head of a classifier."""
    heads = new_heads(model) if hasattr(model, "config") else []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names or is_inside(name, heads))
    return model


def is_attention(module: nn.Module) -> bool:
    """Whether a module is an attention layer, by the name of its class."""
    return "Attention" in type(module).__name__


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Whether the name of a parameter or module is inside one of these modules."""
    return any(name == each or name.startswith(f"{each}.") for each in modules)
