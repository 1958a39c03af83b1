"""Pretrained language models and their tokenizers: `model=gpt2`, or another one by name or folder."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from memsave.config import ConfigError, option, register
from memsave.config.schema import ModelConfig
from memsave.models.language import fuse_gelu
from memsave.own_code import import_class
from memsave.progress import Progress
from memsave.training.memory_error import is_out_of_memory

HUB_TIMEOUT = 10.0  # seconds
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
"""For `from_pretrained`: without it, transformers asks the user whether to run the code in the folder of a model."""
GPT2_SIZES: dict[str, dict[str, Any]] = {  # used without a request to the hub
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}


HEADS = {
    "causal": ("a causal language model", "AutoModelForCausalLM", "openai-community/gpt2"),
    "masked": ("a masked language model", "AutoModelForMaskedLM", "FacebookAI/roberta-base"),
    "classification": ("a model that can classify", "AutoModelForSequenceClassification", "FacebookAI/roberta-base"),
    "encoder_decoder": ("an encoder-decoder", "AutoModelForSeq2SeqLM", "google-t5/t5-small"),
}
"""By purpose: a description of the model, its class in transformers, and an example of a name."""


ROBERTAS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "data2vec-text", "mpnet")
"""Types of models whose first positions, up to the number of the padding token, belong to padding."""


@dataclass(frozen=True)
class Purpose:
    """What a model is for, which decides its head."""

    kind: str
    """A key of HEADS."""
    labels: int = 0
    """kind="classification": the number of classes of the new head."""

    @property
    def description(self) -> str:
        """In words."""
        return HEADS[self.kind][0]

    @property
    def auto_class(self) -> Any:
        """The class of transformers that loads such a model."""
        import transformers

        return getattr(transformers, HEADS[self.kind][1])

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for the config of the model."""
        return {"num_labels": self.labels} if self.kind == "classification" else {}

    def fits(self, architecture: Any) -> bool:
        """Whether a model of this architecture can serve the purpose.

        transformers also loads an encoder such as BERT as a causal model, but every token then attends to later tokens.
        """
        import transformers as hf

        kind = type(architecture)
        if self.kind == "encoder_decoder":
            return kind in hf.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
        if self.kind == "classification":
            return kind in hf.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        is_masked, is_decoder = kind in hf.MODEL_FOR_MASKED_LM_MAPPING, getattr(architecture, "is_decoder", False)
        if self.kind == "masked":
            return is_masked and not is_decoder and not architecture.is_encoder_decoder
        is_causal = is_decoder or architecture.is_encoder_decoder  # of these, transformers loads only the decoder
        return kind in hf.MODEL_FOR_CAUSAL_LM_MAPPING and (is_causal or not is_masked)


@register("model", "language")
@dataclass
class LanguageModel(ModelConfig):
    """A language model of transformers, by its name on the model hub or by folder."""

    reversible: ClassVar[bool] = False
    """Whether the model supports memory=reversible."""
    kind: str = "language"
    name: str = option()
    """Name on the model hub, or a folder."""
    head: str = option("chunked", choices=("chunked", "logits"))
    """chunked computes the loss without storing the logits of all targets; logits uses the logits of the model."""
    target: str = ""
    """A class of your own, derived from PreTrainedModel; name is then a folder with its config.json and tokenizer."""
    random: bool = False
    """Train from random weights, of trainer.seed, in place of the pretrained ones; the tokenizer stays."""

    def load(self, purpose: Purpose, *, progress: Progress) -> tuple[nn.Module, Any]:
        """(model in float32, tokenizer with the special tokens that the purpose needs). Raises ConfigError."""
        self.register_class()
        return load_pretrained(self.name, purpose)

    def register_class(self) -> None:
        """Let transformers know `target`. Raises ConfigError if it cannot be imported."""
        if self.target:
            register_own_class(self.target)

    def load_tokenizer(self, *, progress: Progress) -> Any:
        """The tokenizer; models that memsave makes or converts are made first. Raises ConfigError."""
        if type(self).load is LanguageModel.load:
            return read_tokenizer(self.name)
        architecture = self.architecture()
        purpose = next(each for each in map(Purpose, HEADS) if each.fits(architecture))
        return self.load(purpose, progress=progress)[1]

    def architecture(self) -> Any:
        """The architecture as a config of transformers, without weights. Raises ConfigError."""
        from transformers import GPT2Config

        self.register_class()
        sizes = GPT2_SIZES.get(self.name.removeprefix("openai-community/"))
        return read_architecture(self.name, reachable(self.name)) if sizes is None else GPT2Config(**sizes)

    def make_random(self, purpose: Purpose, *, architecture: Mapping[str, Any] | None = None) -> nn.Module:
        """The model with random weights in float32. `architecture` overrides attributes of the transformers config."""
        found = self.architecture()
        _check_purpose(purpose, found, self.name)
        for name, value in {**purpose.options, **(architecture or {})}.items():
            setattr(found, name, value)
        model = purpose.auto_class.from_config(found, dtype=torch.float32)
        fuse_gelu(model)
        return model


def register_own_class(target: str) -> None:
    """Let the Auto classes of transformers load a class of one's own. Raises ConfigError if it is none."""
    import transformers as hf

    cls: Any = import_class(target, hf.PreTrainedModel)
    config = cls.config_class
    if config is None or not getattr(config, "model_type", ""):
        raise ConfigError(f"{target} has no config_class with a model_type; give it one, as transformers' models have")
    kinds = {"ForSequenceClassification": "classification", "ForMaskedLM": "masked"}
    kind = next((each for ending, each in kinds.items() if cls.__name__.endswith(ending)), "causal")
    kind = "encoder_decoder" if kind == "causal" and config().is_encoder_decoder else kind
    try:
        hf.AutoConfig.register(config.model_type, config, exist_ok=True)
        getattr(hf, HEADS[kind][1]).register(config, cls, exist_ok=True)
    except ValueError as error:
        raise ConfigError(f"{target} cannot be registered with transformers ({_first_line(error)})") from error


def load_pretrained(name: str, purpose: Purpose) -> tuple[nn.Module, Any]:
    """(model in float32, tokenizer), by name or folder. Raises ConfigError."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    import memsave.models.rev_gpt2  # noqa: F401 (registers the class with AutoModelForCausalLM)

    logging.disable_progress_bar()
    folder = reachable(name)
    _check_purpose(purpose, read_architecture(name, folder), name)
    with readable(lambda reason: _cannot_be_loaded(name, purpose, reason)):
        with _without_report() if purpose.kind == "classification" else nullcontext():
            model, report = purpose.auto_class.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, **purpose.options, **NO_CODE
            )
        tokenizer = AutoTokenizer.from_pretrained(folder, **NO_CODE)
    _complete_tokenizer(tokenizer, purpose, name)
    if purpose.kind == "classification":
        _check_body(model, report["missing_keys"], name)
        model.config.pad_token_id = tokenizer.pad_token_id  # a causal model classifies from the last token before it
    fuse_gelu(model)
    model.name_or_path = str(Path(folder).resolve()) if Path(name).expanduser().is_dir() else name  # for PEFT's files
    return model, tokenizer


def _check_body(model: Any, missing: Iterable[str], name: str) -> None:
    """Raise ConfigError if the checkpoint lacks weights beside the head and the pooler below it, which are new."""
    body = f"{model.base_model_prefix}."
    lost = sorted(each for each in missing if each.startswith(body) and ".pooler." not in each)
    if lost:
        raise ConfigError(f"model.name={name} has no weights for {lost[0]}; give a checkpoint of the whole model")


@contextmanager
def _without_report() -> Iterator[None]:
    """Context in which transformers prints no table of weights that a new head lacks."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def read_tokenizer(name: str) -> Any:
    """The tokenizer of a model by name or folder. Raises ConfigError."""
    from transformers import AutoTokenizer

    folder = reachable(name)
    with readable(lambda reason: f"{name} has no tokenizer that transformers can load ({reason}); give another model"):
        return AutoTokenizer.from_pretrained(folder, **NO_CODE)


@contextmanager
def readable(message: Callable[[str], str]) -> Iterator[None]:
    """Context that reads the files of a model: an error becomes ConfigError(message(its first line)).

    A damaged file raises errors of many libraries; tokenizers raises Exception itself.
    """
    try:
        yield
    except (ConfigError, ModuleNotFoundError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError(message(_first_line(error))) from error


def with_random_weights(model: Any) -> nn.Module:
    """A model of the same class and config with random weights, of the global random state."""
    found = type(model)(model.config)
    fuse_gelu(found)
    return found


def _complete_tokenizer(tokenizer: Any, purpose: Purpose, name: str) -> None:
    """Set a missing padding token; raises ConfigError if another token that the purpose needs is missing."""
    if purpose.kind == "masked":
        needed, words = tokenizer.mask_token_id, "mask token"
    elif purpose.kind == "classification":
        needed, words = (tokenizer.eos_token_id or tokenizer.pad_token_id), "padding token"
    else:
        needed, words = tokenizer.eos_token_id, "end-of-text token"
    if needed is None:
        raise ConfigError(f"the tokenizer of {name} has no {words}; give a model whose tokenizer has one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def read_architecture(name: str, folder: str) -> Any:
    """The transformers config in a folder or on the hub. Raises ConfigError."""
    from transformers import AutoConfig

    with readable(lambda reason: f"{name} holds no model that transformers knows ({reason}); give another model.name"):
        return AutoConfig.from_pretrained(folder, **NO_CODE)


def _check_purpose(purpose: Purpose, architecture: Any, name: str) -> None:
    """Raise ConfigError for an architecture that cannot serve the purpose."""
    if not purpose.fits(architecture):
        found = (architecture.architectures or [architecture.model_type])[0]
        raise ConfigError(
            f"{name} is a {found}, which is not {purpose.description}; give the model.name of one, such as "
            f"{HEADS[purpose.kind][2]}"
        )


def _cannot_be_loaded(name: str, purpose: Purpose, reason: str) -> str:
    return (
        f"{name} cannot be loaded as {purpose.description} with its tokenizer ({reason}); give a "
        f"model.name that transformers' {HEADS[purpose.kind][1]} and AutoTokenizer load"
    )


def usable_positions(architecture: Any) -> int | None:
    """The largest number of tokens of a row; None for no limit."""
    found: int | None = getattr(architecture, "max_position_embeddings", None)
    if found is None or architecture.model_type not in ROBERTAS:
        return found
    return found - 1 - architecture.pad_token_id


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
