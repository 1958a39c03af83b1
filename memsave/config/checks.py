"""What types alone let through: refused before anything runs, by key, with what is valid."""

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

from memsave.config.errors import ConfigError
from memsave.config.schema import (
    KINDS,
    BratsData,
    Config,
    E2EData,
    GhostPrivacy,
    LanguageModel,
    PhantomData,
    RevGPT2,
    SegmentationData,
    SmallGPT2,
    TextData,
    UNetModel,
)
from memsave.data.volumes.layouts import LAYOUTS
from memsave.data.volumes.schemes import SCHEMES
from memsave.profiler import parse_bytes

MODES = ("stored", "checkpoint", "reversible")
VARIES = ("volume", "depth", "channels", "batch", "length")
MOST = float("inf")
TASKS = {"segmentation": (SegmentationData, UNetModel), "table_to_text": (TextData, LanguageModel)}
OPTIONS = {  # that go together
    "segmentation": "data=phantom, mni_phantom or brats, and model=rev_unet",
    "table_to_text": "data=visits or e2e, and model=small_gpt2, rev_gpt2, gpt2 or smollm2",
}

Choice = tuple[str, Any, tuple[Any, ...]]
Number = tuple[str, float, float, float]


def check(config: Config) -> None:
    """Raise ConfigError for the first thing that is wrong."""
    for key, value, valid in _choices(config):
        if value not in valid:
            named = ", ".join(map(str, valid))
            raise ConfigError(f"{key} is {value!r}; choose one of {named}{closest(str(value), map(str, valid))}")
    for name, kind in zip(("data", "model"), TASKS[config.task], strict=True):
        if not isinstance(getattr(config, name), kind):
            chosen = _option(getattr(config, name))
            raise ConfigError(f"task={config.task} does not go with {name}={chosen}; give {OPTIONS[config.task]}")
    for key, number, least, limit in _numbers(config):
        if not least <= number <= limit:
            above = "" if limit == MOST else f" and at most {limit:g}"
            raise ConfigError(f"{key} is {number}; it must be at least {least:g}{above}")
    _check_data(config.data)
    _check_together(config)
    for key, value in (
        ("budget", "0" if config.budget == "auto" else config.budget),
        ("reserve", config.reserve),
        ("privacy.memory_budget", getattr(config.privacy, "memory_budget", None)),
    ):
        try:
            parse_bytes("0" if value is None else value)
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from error
    _check_variation(config)
    _check_memory(config)
    if isinstance(config.model, UNetModel) and config.model.squeeze_excitation and config.memory.engine == "fused":
        raise ConfigError(
            "memory.engine=fused cannot recompute squeeze-excitation in chunks; give memory.engine=auto or "
            "model.squeeze_excitation=0"
        )
    if isinstance(config.model, LanguageModel):
        _check_reversible_text(config)


def _option(chosen: Any) -> str:
    """What the option of a group is called whose schema this is."""
    return "gpt2" if chosen.kind == "language" else chosen.kind


def _check_reversible_text(config: Config) -> None:
    """Of the language models one is reversible, and without anchors."""
    asked = "reversible" in (config.memory.mode, *config.profiler.compare)
    if asked and not isinstance(config.model, RevGPT2):
        raise ConfigError(
            f"model={_option(config.model)} has no reversible mode; give memory=stored or memory=checkpoint, or "
            f"model=rev_gpt2"
        )
    if config.memory.anchor_every is not None:
        raise ConfigError(f"memory.anchor_every is for model=rev_unet; leave it out of model={_option(config.model)}")
    if config.memory.engine != "auto":
        raise ConfigError(f"memory.engine is for model=rev_unet; leave it out of model={_option(config.model)}")


def _check_memory(config: Config) -> None:
    memory = config.memory
    rebuilds = memory.mode in ("reversible", "auto")
    if memory.anchor_every is not None and not rebuilds:
        raise ConfigError(f"memory.anchor_every is for memory=reversible; leave it out of memory={memory.mode}")
    if memory.engine != "auto" and not rebuilds:
        raise ConfigError(f"memory.engine is for memory=reversible; leave it out of memory={memory.mode}")
    if memory.levels is not None and memory.mode != "auto":
        raise ConfigError(f"memory.levels is for memory=auto; leave it out of memory={memory.mode}")
    if memory.levels is not None and len(memory.levels) != len(getattr(config.model, "channels", ())):
        raise ConfigError(f"memory.levels is {memory.levels}; give a mode for each level of a U-Net, finest first")
    if memory.mode == "auto" and memory.levels is None and config.budget is None:
        raise ConfigError("memory=auto needs a budget, as in budget=8GiB or budget=auto")
    if memory.mode == "auto" and config.vary is not None:
        raise ConfigError(f"memory=auto is for one size; leave vary={config.vary} out, or give another memory=")


def _check_together(config: Config) -> None:
    """What is valid by itself and not in company."""
    trainer, private = config.trainer, isinstance(config.privacy, GhostPrivacy)
    if trainer.patience and not trainer.evaluate_every:
        raise ConfigError("trainer.patience counts evaluations; give trainer.evaluate_every, too")
    if trainer.patience and private:
        raise ConfigError(
            "trainer.patience would choose the model by private validation scores, which no epsilon accounts for; "
            "give trainer.patience=0"
        )
    crops = getattr(config.data, "crops_per_case", 1)
    if crops > 1 and isinstance(config.privacy, GhostPrivacy) and config.privacy.passes != "direct":
        raise ConfigError(
            f"data.crops_per_case is {crops}, and a patient's crops are clipped as one, by their own gradient; give "
            f"privacy.passes=direct trainer.micro_batch_size=1"
        )
    privacy: Any = config.privacy
    if privacy.option == "direct" and trainer.micro_batch_size != 1:
        raise ConfigError("privacy.passes=direct takes one example at a time; give trainer.micro_batch_size=1")
    if private and privacy.clipping == "per_layer" and privacy.passes == 2:
        raise ConfigError("privacy.clipping=per_layer forms its sums in one pass; give privacy.passes=auto")
    if trainer.precision == "float16" and private:
        raise ConfigError("trainer.precision=float16 scales losses, which clipping would undo; give bfloat16")


def _check_variation(config: Config) -> None:
    """What can be varied, and whether it can be trained then."""
    images = isinstance(config.data, SegmentationData)
    if config.vary == ("length" if images else "volume"):
        other = "volume" if images else "length"
        raise ConfigError(f"vary={config.vary} is not of task={config.task}; give vary={other}")
    if config.vary is not None and config.budget is None:
        raise ConfigError(f"vary={config.vary} needs a budget, as in budget=16GiB or budget=auto")
    if config.vary == "batch" and config.privacy.option == "direct":
        raise ConfigError(
            "vary=batch tries more examples at once than the one of privacy=direct; give another privacy="
        )
    if config.vary in ("depth", "channels") and config.mode == "train" and not images:
        raise ConfigError(f"vary={config.vary} is another model than the pretrained one; give mode=plan")


def closest(word: str, names: Iterable[str]) -> str:
    """The name that was perhaps meant, as a question in parentheses."""
    match = difflib.get_close_matches(word, list(names), n=1, cutoff=0.5)
    return f" (did you mean {match[0]}?)" if match else ""


def _check_data(data: Any) -> None:
    if isinstance(data, SegmentationData) and len(data.crop_size) != 3:
        raise ConfigError(f"data.crop_size is {data.crop_size}; give three numbers, as in data.crop_size=[48,48,48]")
    if isinstance(data, SegmentationData) and data.spacing is not None and len(data.spacing) != 3:
        raise ConfigError(f"data.spacing is {data.spacing}; give three numbers, as in data.spacing=[1,1,1]")
    if isinstance(data, SegmentationData) and data.folds is not None and not data.fold < data.folds:
        raise ConfigError(f"data.fold is {data.fold} of {data.folds} folds; give one from 0 to {data.folds - 1}")
    if isinstance(data, SegmentationData) and data.folds is not None and data.split_file is not None:
        raise ConfigError("data.folds and data.split_file both say what is held out; give one of the two")
    if isinstance(data, PhantomData) and len(data.size) != 3:
        raise ConfigError(f"data.size is {data.size}; give three numbers, as in data.size=[96,96,80]")
    if isinstance(data, BratsData) and not data.root:
        raise ConfigError("data.root is not given; name the folder of the cases, as in data.root=/my/BraTS2021")
    if isinstance(data, E2EData) and not data.root:
        raise ConfigError("data.root is not given; name the folder of the CSV files, as in data.root=/my/e2e")


def _choices(config: Config) -> Iterator[Choice]:
    trainer, privacy = config.trainer, config.privacy
    yield "task", config.task, tuple(TASKS)
    yield "mode", config.mode, ("train", "plan")
    yield "vary", config.vary, (None, *VARIES)
    yield "memory.mode", config.memory.mode, (*MODES, "auto")
    for mode in config.memory.levels or ():
        yield "memory.levels", mode, MODES
    yield "memory.engine", config.memory.engine, ("auto", "fused", "hooks")
    yield "trainer.precision", trainer.precision, ("float32", "bfloat16", "float16")
    yield "trainer.optimizer.name", trainer.optimizer.name, ("adamw", "sgd")
    yield "trainer.optimizer.schedule", trainer.optimizer.schedule, ("cosine", "constant")
    for mode in config.profiler.compare:
        yield "profiler.compare", mode, MODES
    for name in KINDS:  # a kind is chosen by choosing the group's option, which brings the schema along
        yield f"{name}.kind", getattr(config, name).kind, (type(getattr(config, name)).kind,)
    if isinstance(config.data, SegmentationData):
        yield "data.augmentation", config.data.augmentation, ("light", "full")
    if isinstance(config.data, BratsData):
        yield "data.check", config.data.check, ("labels", "all", "none")
        yield "data.layout", config.data.layout, tuple(LAYOUTS)
        yield "data.scheme", config.data.scheme, (None, *SCHEMES)
    if isinstance(config.model, LanguageModel):
        yield "model.head", config.model.head, ("chunked", "logits")
    if isinstance(config.model, UNetModel):
        yield "model.skip", config.model.skip, ("add", "concat")
    if isinstance(privacy, GhostPrivacy):
        yield "privacy.clipping", privacy.clipping, ("flat", "automatic", "per_layer")
        yield "privacy.passes", privacy.passes, ("auto", 1, 2, "direct")
        yield "privacy.accountant", privacy.accountant, ("prv", "rdp")


def _numbers(config: Config) -> Iterator[Number]:
    trainer, optimizer = config.trainer, config.trainer.optimizer
    yield from (
        ("trainer.steps", trainer.steps, 1, MOST),
        ("trainer.epochs", 1 if trainer.epochs is None else trainer.epochs, 0.001, MOST),
        ("trainer.batch_size", trainer.batch_size, 1, MOST),
        ("trainer.micro_batch_size", 1 if trainer.micro_batch_size is None else trainer.micro_batch_size, 1, MOST),
        ("trainer.ema", trainer.ema, 0, 0.999999),
        ("trainer.patience", trainer.patience, 0, MOST),
        ("trainer.seed", trainer.seed, 0, MOST),
        ("trainer.evaluate_every", trainer.evaluate_every, 0, MOST),
        ("trainer.checkpoint_every", trainer.checkpoint_every, 1, MOST),
        ("trainer.optimizer.lr", optimizer.lr, 0, MOST),
        ("trainer.optimizer.weight_decay", optimizer.weight_decay, 0, MOST),
        ("trainer.optimizer.momentum", optimizer.momentum, 0, 0.999999),
        ("trainer.optimizer.warmup_steps", optimizer.warmup_steps, 0, MOST),
        ("memory.chunks", config.memory.chunks, 1, MOST),
        ("memory.anchor_every", 1 if config.memory.anchor_every is None else config.memory.anchor_every, 1, MOST),
        ("profiler.record_steps", config.profiler.record_steps, 1, MOST),
        ("profiler.compare_seconds", config.profiler.compare_seconds, 0, MOST),
        ("profiler.plan_seconds", config.profiler.plan_seconds, 0, MOST),
    )
    yield from _data_numbers(config.data)
    yield from _model_numbers(config.model)
    privacy = config.privacy
    if isinstance(privacy, GhostPrivacy):
        yield "privacy.target_epsilon", privacy.target_epsilon, 0.001, MOST
        yield "privacy.max_grad_norm", privacy.max_grad_norm, 1e-12, MOST
        yield "privacy.noise_multiplier", privacy.noise_multiplier or 0, 0, MOST
        yield "privacy.seed", privacy.seed or 0, 0, MOST


def _data_numbers(data: Any) -> Iterator[Number]:
    if isinstance(data, SegmentationData):
        yield "data.crops_per_case", data.crops_per_case, 1, MOST
        yield "data.foreground", data.foreground, 0, 1
        yield "data.folds", 2 if data.folds is None else data.folds, 2, MOST
        yield "data.fold", data.fold, 0, MOST
        yield "data.smallest_et", data.smallest_et, 0, MOST
        yield from (("data.spacing", mm, 1e-3, MOST) for mm in data.spacing or ())
        yield "data.validation_fraction", data.validation_fraction, 0.001, 0.999
        yield "data.split_seed", data.split_seed, 0, MOST
        yield "data.workers", data.workers, 0, MOST
        yield "data.cache_bytes", data.cache_bytes, 0, MOST
        yield from (("data.crop_size", voxels, 1, MOST) for voxels in data.crop_size)
    if isinstance(data, TextData):
        yield "data.max_length", data.max_length, 8, MOST
        yield "data.evaluate", data.evaluate, 1, MOST
        yield "data.generate", data.generate, 1, MOST
        yield "data.beams", data.beams, 1, MOST
        yield "data.records", getattr(data, "records", 1), 1, MOST
        yield "data.held_out", getattr(data, "held_out", 1), 1, MOST


def _model_numbers(model: Any) -> Iterator[Number]:
    if isinstance(model, UNetModel):
        yield "model.expansion", model.expansion, 1, MOST
        yield "model.squeeze_excitation", model.squeeze_excitation, 0, MOST
        yield "model.dropout", model.dropout, 0, 0.999
    if isinstance(model, SmallGPT2):
        for name in ("layers", "heads", "width", "positions", "records", "steps", "batch_size"):
            yield f"model.{name}", getattr(model, name), 1, MOST
        yield "model.vocabulary", model.vocabulary, 300, MOST
