"""Files of language models with adapters: `model/` as PEFT writes it, or the whole model."""

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memsave.config import ConfigError
from memsave.files import parse_json
from memsave.models.padding import base_of
from memsave.own_code import write_own_class
from memsave.processes import class_of

ADAPTER = "adapter_config.json"


def save_model(model: Any, folder: Path) -> None:
    """Write a model for `from_pretrained(folder)`: the adapter alone of a PEFT model, other models completely.

    `config.json` beside an adapter is that of its base model, which has the labels of a classifier.
    """
    base: Any = base_of(model)
    folder.mkdir(parents=True, exist_ok=True)
    write_own_class(class_of(base), folder)
    if base is model:
        model.save_pretrained(folder)
        return
    # Embeddings are frozen, unless they are in modules_to_save; "auto" would ask the model hub whether they changed.
    used = {name: each for name, each in model.state_dict().items() if ".original_module." not in name}
    with torch.no_grad():  # the results of a projection are computed, outside of the forward that a clipper follows
        model.save_pretrained(folder, state_dict=used, save_embedding_layers=False)
    config = deepcopy(base.config)
    config.architectures = [type(base).__name__]
    config.save_pretrained(folder)


def merged(model: Any) -> nn.Module:
    """A new model on the CPU, without PEFT, that has the adapter added to its weights; the given one stays as it is."""
    from peft import get_peft_model
    from peft.utils import ModulesToSaveWrapper

    base: Any = base_of(model)
    copy: Any = type(base)(deepcopy(base.config)).to(base.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same as for the given model
        adapted: Any = get_peft_model(copy, deepcopy(model.active_peft_config))
    adapted.load_state_dict(model.state_dict())
    for name, module in list(adapted.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):  # PEFT's IA3 cannot take a head of several layers out of it
            adapted.set_submodule(name, module.modules_to_save[module.active_adapters[0]])
    whole = adapted.merge_and_unload()
    if base.can_generate():
        whole.generation_config = deepcopy(base.generation_config)
    return whole.eval()


def load_adapted(folder: Path) -> Any:
    """The base model of the adapter in a folder, with the adapter, in eval mode on the CPU. Raises ConfigError."""
    from peft import PeftModel
    from transformers import AutoConfig
    from transformers.utils import logging

    import memsave.models.rev_gpt2  # noqa: F401 (registers the class with AutoModelForCausalLM)
    from memsave.tasks.language.pretrained import NO_CODE, readable

    name = _base_name(folder)
    _refuse_missing(name, folder)
    before = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # the head of a classifier is not in the base model, but beside the adapter
    try:
        with readable(lambda reason: f"{folder} cannot be loaded as an adapter of {name} ({reason}); copy it again"):
            config = AutoConfig.from_pretrained(folder if (folder / "config.json").is_file() else name, **NO_CODE)
            base = _class_of(config).from_pretrained(name, config=config, dtype=torch.float32, **NO_CODE)
            return PeftModel.from_pretrained(base, str(folder)).eval()
    finally:
        logging.set_verbosity(before)


def _base_name(folder: Path) -> str:
    path = folder / ADAPTER
    try:
        name = parse_json(path.read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error!r}); copy the model's folder again") from error
    if not name:
        raise ConfigError(f"{path} names no base model; give its name or folder as base_model_name_or_path there")
    return str(name)


def _refuse_missing(name: str, folder: Path) -> None:
    """Raise ConfigError if the base model is neither a folder nor a model of the hub."""
    from memsave.tasks.language.pretrained import reachable

    try:
        reachable(name)
    except ConfigError as error:
        raise ConfigError(
            f"{folder} holds an adapter of the model {name}, which is not there; copy that model to this place, or "
            f"give its name or folder as base_model_name_or_path in {folder / ADAPTER}"
        ) from error


def _class_of(config: Any) -> Any:
    """The class of transformers that the config names; for classes outside of it, that of a causal language model."""
    import transformers

    named = getattr(transformers, (config.architectures or [""])[0], None)
    is_model = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    return named if is_model else transformers.AutoModelForCausalLM
