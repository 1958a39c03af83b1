"""The adapters of PEFT: modules that are added to a frozen language model and train alone.

    adapter=lora    y = W x + (alpha / rank) B A x, with A and B trained          Hu et al., 2021
    adapter=dora    lora on the direction of W; its magnitude trains, too         Liu et al., 2024
    adapter=ia3     keys, values and feed-forward activations times a vector      Liu et al., 2022
    adapter=prefix  keys and values of virtual tokens in every attention layer    Li and Liang, 2021
    adapter=prompt  embeddings of virtual tokens before the text                  Lester et al., 2021

The new head of a sequence classifier trains with each of them. `model/` holds the adapter (see `adapter_files`).
"""

import inspect
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from memsave.config import ConfigError, option, register
from memsave.config.fields import closest
from memsave.ghost.gradients import has_values
from memsave.tasks.language.adapter_files import merged
from memsave.tasks.language.trained_parts import CLASSIFIER, LanguageAdapter, is_encoder, is_inside, new_heads, task_of
from memsave.training.measure import get_memory, set_memory


@dataclass
class PeftAdapter(LanguageAdapter):
    """The base of the adapters of PEFT."""

    def settings(self, model: Any, *, task: str | None) -> Any:
        """The config of PEFT for this model."""
        raise NotImplementedError

    def apply(self, model: nn.Module) -> nn.Module:
        """The model with the adapter; only the adapter and the new head of a classifier train."""
        from peft import get_peft_model

        settings, mode = self.settings(model, task=task_of(model)), get_memory(model)
        set_memory(model, "stored")  # otherwise PEFT makes the output of the embedding require grad
        with warnings.catch_warnings(), without_moves(model):
            warnings.simplefilter("ignore")  # about settings that PEFT corrects itself
            try:
                adapted = get_peft_model(model, settings)
            except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                raise ConfigError(f"adapter={self.kind} does not fit {type(model).__name__}: {lines[0]}") from error
        set_memory(adapted, mode)
        return adapted.train(model.training)


@register("adapter", "lora")
@dataclass
class Lora(PeftAdapter):
    """Low-rank matrices beside frozen linear layers (LoRA, by PEFT)."""

    kind: str = "lora"
    rank: int = option(8, least=1)
    """Rank of the matrices."""
    alpha: int = option(16, least=1)
    """The product of the matrices is multiplied by alpha / rank."""
    dropout: float = option(0.0, least=0, most=0.99)
    """Dropout of the input of the matrices."""
    target_modules: list[str] | None = None
    """Names of the adapted layers, as in [c_attn,c_proj], or [all-linear]; null takes PEFT's default for the
    architecture, or all linear layers if it has none."""
    layers: list[int] | None = option(None, least=0)
    """Numbers of the adapted Transformer layers, from 0; null adapts all."""
    modules_to_save: list[str] | None = None
    """Names of modules that train completely and are released with the adapter."""
    bias: str = option("none", choices=("none", "all", "lora_only"))
    """Biases that train: none, all, or those of adapted layers."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead."""
    init: str = option("default", choices=("default", "gaussian", "orthogonal"))
    """Initial values of the matrices; the model with the adapter equals the model without it at first."""
    merge: bool = False
    """Release the whole model, with the adapter added to its weights, instead of the adapter."""

    use_dora: ClassVar[bool] = False

    def settings(self, model: Any, *, task: str | None) -> Any:
        """`peft.LoraConfig`."""
        from peft import LoraConfig
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS
        from transformers.pytorch_utils import Conv1D

        adapted = targets(self.target_modules, model, defaults=DEFAULTS)
        if self.layers and adapted == "all-linear":  # PEFT takes numbers of layers with names alone
            adapted = linear_names(model)
        options: dict[str, Any] = {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": adapted,
            "layers_to_transform": list(self.layers) if self.layers else None,
            "modules_to_save": trained_modules(self.modules_to_save, model),
            "bias": self.bias,
            "use_rslora": self.rslora,
            "use_dora": self.use_dora,
            "init_lora_weights": True if self.init == "default" else self.init,
            "fan_in_fan_out": any(isinstance(module, Conv1D) for module in model.modules()),
        }
        return LoraConfig(task_type=task, **options)

    def released(self, model: nn.Module) -> nn.Module:
        """The adapter, or the merged model."""
        return merged(model) if self.merge else model


@register("adapter", "dora")
@dataclass
class Dora(Lora):
    """LoRA on the directions of the weights, and trained magnitudes (DoRA, by PEFT)."""

    ghost_modes: ClassVar[tuple[str, ...]] = ("stored",)  # its weight norms cannot be traced through a recomputation
    kind: str = "dora"
    use_dora: ClassVar[bool] = True


@register("adapter", "ia3")
@dataclass
class IA3(PeftAdapter):
    """Trained factors of keys, values and feed-forward activations (IA3, by PEFT)."""

    kind: str = "ia3"
    target_modules: list[str] | None = None
    """Names of the adapted layers; null takes PEFT's default for the architecture, or all linear layers."""
    feedforward_modules: list[str] | None = None
    """Those of target_modules whose input is multiplied instead of their output; null: PEFT's default, or none."""
    modules_to_save: list[str] | None = None
    """Names of modules that train completely and are released with the adapter."""
    merge: bool = False
    """Release the whole model, with the factors in its weights, instead of the adapter."""

    def settings(self, model: Any, *, task: str | None) -> Any:
        """`peft.IA3Config`."""
        from peft import IA3Config
        from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD
        from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as DEFAULTS
        from transformers.pytorch_utils import Conv1D

        kind, inner = model.config.model_type, list(self.feedforward_modules or ())
        if self.feedforward_modules is None and self.target_modules is None:
            inner = list(FEEDFORWARD.get(kind, []))
        found = targets(self.target_modules, model, defaults=DEFAULTS) or DEFAULTS[kind]
        wrong = [] if isinstance(found, str) else [name for name in inner if name not in found]
        if wrong:
            raise ConfigError(
                f"adapter.feedforward_modules has {wrong[0]}, which adapter.target_modules lacks; give it there, too"
            )
        return IA3Config(
            task_type=task,
            target_modules=found,
            feedforward_modules=inner,
            modules_to_save=trained_modules(self.modules_to_save, model),
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        )

    def released(self, model: nn.Module) -> nn.Module:
        """The adapter, or the merged model."""
        return merged(model) if self.merge else model


@dataclass
class VirtualTokens(PeftAdapter):
    """The base of the adapters that put virtual tokens before each text. They cannot be merged into the weights."""

    tokens: int = option(20, least=1)
    """Number of virtual tokens; they take positions of the model."""

    @property
    def added_tokens(self) -> int:
        """The virtual tokens."""
        return self.tokens

    def apply(self, model: nn.Module) -> nn.Module:
        """The model with virtual tokens. Raises ConfigError if it takes none."""
        name, task = type(model).__name__, task_of(model)
        if task is None or "inputs_embeds" not in inspect.signature(type(model).forward).parameters:
            raise ConfigError(
                f"adapter={self.kind} needs virtual tokens, which {name} does not take; give adapter=lora"
            )
        return super().apply(model)


@register("adapter", "prefix")
@dataclass
class Prefix(VirtualTokens):
    """Trained keys and values of virtual tokens in every attention layer (prefix tuning, by PEFT)."""

    memory_modes: ClassVar[tuple[str, ...]] = ("stored",)  # they are in the cache, which checkpointed layers ignore
    kind: str = "prefix"
    projection: bool = False
    """Compute them by a network with one hidden layer during training, and release its results."""
    projection_size: int | None = option(None, least=1)
    """Size of the hidden layer; null takes the width of the model."""

    def validate(self) -> None:
        """Raise ConfigError for the size of a projection that is off."""
        if self.projection_size is not None and not self.projection:
            raise ConfigError("adapter.projection_size is for adapter.projection=true; give both, or leave it out")

    def settings(self, model: Any, *, task: str | None) -> Any:
        """`peft.PrefixTuningConfig`."""
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(
            task_type=task,
            num_virtual_tokens=self.tokens,
            prefix_projection=self.projection,
            encoder_hidden_size=self.projection_size or model.config.hidden_size,
        )


@register("adapter", "prompt")
@dataclass
class Prompt(VirtualTokens):
    """Trained embeddings of virtual tokens before each text (prompt tuning, by PEFT)."""

    kind: str = "prompt"
    init: str = option("vocabulary", choices=("vocabulary", "random"))
    """Initial embeddings: those of random tokens of the vocabulary, or random numbers."""

    def apply(self, model: nn.Module) -> nn.Module:
        """The model with virtual tokens. Raises ConfigError for classifiers that read the last token."""
        if task_of(model) == CLASSIFIER and not is_encoder(model):
            raise ConfigError(
                f"adapter=prompt does not fit {type(model).__name__}, which finds the last token of a text by its "
                f"token ids; give adapter=prefix or adapter=lora"
            )
        return super().apply(model)

    def settings(self, model: Any, *, task: str | None) -> Any:
        """`peft.PromptTuningConfig`."""
        from peft import PromptTuningConfig, PromptTuningInit

        start = PromptTuningInit.RANDOM if self.init == "random" else PromptTuningInit.SAMPLE_VOCAB
        return PromptTuningConfig(task_type=task, num_virtual_tokens=self.tokens, prompt_tuning_init=start)


@contextmanager
def without_moves(model: nn.Module) -> Iterator[None]:
    """Context in which the modules of a model on fake tensors stay on the device where they are made.

    PEFT moves its new modules to the device of the model. `nn.Module.to` fails for fake parameters.
    """
    move = nn.Module.to
    if not has_values(next(model.parameters())):
        nn.Module.to = lambda module, *_, **__: module  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.to = move  # type: ignore[method-assign]


def targets(given: list[str] | None, model: Any, *, defaults: Any) -> Any:
    """The layers for PEFT; None for its own default. Raises ConfigError for a name that no layer has."""
    if given is None:
        return None if model.config.model_type in defaults else "all-linear"
    if list(given) == ["all-linear"]:
        return "all-linear"
    from transformers.pytorch_utils import Conv1D

    layers = (nn.Linear, Conv1D, nn.Embedding)
    check_names(given, (name for name, each in model.named_modules() if isinstance(each, layers)), model, "layers")
    return list(given)


def linear_names(model: Any) -> list[str]:
    """The last parts of the names of all linear layers except the head."""
    from transformers.pytorch_utils import Conv1D

    head, new = model.get_output_embeddings(), new_heads(model)
    found = (
        name.rpartition(".")[2]
        for name, each in model.named_modules()
        if isinstance(each, (nn.Linear, Conv1D)) and each is not head and not is_inside(name, new)
    )
    return list(dict.fromkeys(found))


def trained_modules(given: list[str] | None, model: Any) -> list[str] | None:
    """The modules that train completely: the given ones, and the new head of a classifier."""
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)}
    check_names(given or (), (name for name, _ in model.named_modules() if name in owners), model, "modules")
    return [*(given or ()), *new_heads(model)] or None


def check_names(given: Iterable[str], existing: Iterable[str], model: nn.Module, what: str) -> None:
    """Raise ConfigError for a name that is not the end of the name of a module."""
    names = list(existing)
    for each in given:
        if not any(name == each or name.endswith(f".{each}") for name in names):
            key = "target_modules" if what == "layers" else "modules_to_save"
            known = list(dict.fromkeys(name.rpartition(".")[2] for name in names if not name[-1].isdigit()))
            raise ConfigError(
                f"adapter.{key} has {each}, which {type(model).__name__} does not have; its {what} are "
                f"{', '.join(known)}{closest(each, known)}"
            )
