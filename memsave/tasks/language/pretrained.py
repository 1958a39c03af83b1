"""Pretrained causal language models and their tokenizers: `model=gpt2`, or another one by name or folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from memsave.config import ConfigError, option, register
from memsave.config.schema import ModelConfig
from memsave.models.language import fuse_gelu
from memsave.progress import Progress

HUB_TIMEOUT = 10.0  # seconds
GPT2_SIZES: dict[str, dict[str, Any]] = {  # used without a request to the hub
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}


@register("model", "language")
@dataclass
class LanguageModel(ModelConfig):
    """A causal language model of transformers, by its name on the model hub or by folder."""

    reversible: ClassVar[bool] = False
    """Whether the model supports memory=reversible."""
    kind: str = "language"
    name: str = option()
    """Name on the model hub, or a folder."""
    head: str = option("chunked", choices=("chunked", "logits"))
    """chunked computes the loss without storing the logits of all targets; logits uses the logits of the model."""
    random: bool = False
    """Train from random weights, of trainer.seed, in place of the pretrained ones; the tokenizer stays."""

    def load(self, *, progress: Progress) -> tuple[nn.Module, Any]:
        """(model in float32, tokenizer with an end and a padding token). Raises ConfigError."""
        return load_pretrained(self.name)

    def architecture(self) -> Any:
        """The architecture as a config of transformers, without weights. Raises ConfigError."""
        from transformers import GPT2Config

        sizes = GPT2_SIZES.get(self.name.removeprefix("openai-community/"))
        return causal_config(self.name, reachable(self.name)) if sizes is None else GPT2Config(**sizes)

    def make_random(self, *, architecture: Mapping[str, Any] | None = None) -> nn.Module:
        """The model with random weights in float32. `architecture` overrides attributes of the transformers config."""
        from transformers import AutoModelForCausalLM

        found = self.architecture()
        for name, value in (architecture or {}).items():
            setattr(found, name, value)
        model = AutoModelForCausalLM.from_config(found, dtype=torch.float32)
        fuse_gelu(model)
        return model


def load_pretrained(name: str) -> tuple[nn.Module, Any]:
    """(causal language model in float32, tokenizer), by name or folder. Raises ConfigError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import memsave.models.rev_gpt2  # noqa: F401 (registers the class with AutoModelForCausalLM)

    logging.disable_progress_bar()
    folder = reachable(name)
    causal_config(name, folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(_cannot_be_loaded(name, error)) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {name} has no end-of-text token; give a model whose tokenizer has one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    fuse_gelu(model)
    model.name_or_path = str(Path(folder).resolve()) if Path(name).expanduser().is_dir() else name  # for PEFT's files
    return model, tokenizer


def with_random_weights(model: Any) -> nn.Module:
    """A model of the same class and config with random weights, of the global random state."""
    found = type(model)(model.config)
    fuse_gelu(found)
    return found


def causal_config(name: str, folder: str) -> Any:
    """The transformers config of a causal model. Raises ConfigError for other models.

    transformers also loads an encoder such as BERT as a causal model, but every token then attends to later tokens.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig

    try:
        found = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(_cannot_be_loaded(name, error)) from error
    causal = getattr(found, "is_decoder", False) or found.is_encoder_decoder  # transformers loads only its decoder
    if type(found) not in MODEL_FOR_CAUSAL_LM_MAPPING or (type(found) in MODEL_FOR_MASKED_LM_MAPPING and not causal):
        architecture = (found.architectures or [found.model_type])[0]
        raise ConfigError(
            f"{name} is a {architecture}, which is not a causal language model; give the model.name of one, such as "
            f"openai-community/gpt2"
        )
    return found


def _cannot_be_loaded(name: str, error: Exception) -> str:
    return (
        f"{name} cannot be loaded as a causal language model with its tokenizer ({_first_line(error)}); give a "
        f"model.name that transformers' AutoModelForCausalLM and AutoTokenizer load"
    )


def reachable(name: str) -> str:
    """The folder of this name, or the name if the hub has it, or the folder of an earlier download.

    It sends one request with a short timeout: transformers repeats its requests for a minute.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(
            f"model.name is {name}, which is neither an existing folder nor a valid name on the hub; give a folder, or "
            f"a name such as openai-community/gpt2"
        ) from error
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except Exception as error:  # several HTTP libraries and the hub have their own classes
        downloaded = try_to_load_from_cache(name, "config.json")
        if isinstance(downloaded, str):
            return str(Path(downloaded).parent)
        raise ConfigError(
            f"the model {name} is not a folder and could not be downloaded from the hub ({_first_line(error)}); with "
            f"internet access, run: hf download {name} --local-dir {folder.name}, then give model.name={folder.name}"
        ) from error
    return name


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
