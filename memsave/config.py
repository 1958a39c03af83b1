"""The schema of every config group, and the composition of a config with errors that a person can act on.

Hydra composes `conf/`; each group's YAML starts from one of the dataclasses below, so that a key is known, typed and
documented in one place. `compose` is what the command line goes through before anything runs: whatever is wrong with
the overrides becomes one `ConfigError` that names the key, what was expected, and the closest valid name.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import MISSING as MISSING_DEFAULT
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

KINDS = ("data", "model", "privacy")
GROUPS = ("experiment", "data", "model", "memory", "privacy", "trainer", "profiler")


class ConfigError(ValueError):
    """A configuration that cannot run; its message is one sentence for the person who wrote it."""


@dataclass
class SegmentationData:
    """What every source of segmentation cases has in common."""

    kind: str = MISSING
    root: str | None = None
    """Folder of the cases; for phantoms, of their cache."""
    crop_size: list[int] = field(default_factory=lambda: [48, 48, 48])
    """Voxels of a training crop."""
    validation_fraction: float = 0.2
    """Share of the cases that are held out, by case."""
    split_seed: int = 0
    workers: int = 1
    """Threads that load ahead of training; 0 loads in between."""
    cache_bytes: int = 4 * 2**30
    """Preprocessed volumes kept in memory."""


@dataclass
class PhantomData(SegmentationData):
    """Generated cases in the BraTS 2021 layout, written as NIfTI once and cached."""

    kind: str = "phantom"
    cases: int = 20
    size: list[int] = field(default_factory=lambda: [96, 96, 80])
    """Voxels of a volume, at 1 mm; up to 240 x 240 x 155."""
    seed: int = 0


@dataclass
class BratsData(SegmentationData):
    """Cases in the folder layout of BraTS 2018-2021: ID/ID_{t1,t1ce,t2,flair,seg}.nii.gz."""

    kind: str = "brats"


@dataclass
class UNetModel:
    """`memsave.models.ReversibleUNet3d`."""

    kind: str = "rev_unet"
    channels: list[int] = field(default_factory=lambda: [16, 32, 64])
    """Channels of the levels, finest first; even."""
    blocks: list[int] = field(default_factory=lambda: [1, 1, 1])
    """Reversible blocks of each level, on the way down and again on the way up."""
    expansion: int = 4
    skip: str = "add"
    """add | concat."""
    squeeze_excitation: float = 0.0
    dropout: float = 0.0


@dataclass
class MemoryConfig:
    """What is kept between forward and backward; it changes neither the function nor its random numbers."""

    mode: str = MISSING
    """stored | checkpoint | reversible."""


@dataclass
class PrivacyConfig:
    """How gradients are combined."""

    kind: str = "none"


@dataclass
class OptimizerConfig:
    """`torch.optim.AdamW` or `torch.optim.SGD`."""

    name: str = "adamw"
    """adamw | sgd."""
    lr: float = 3e-3
    weight_decay: float = 1e-5
    momentum: float = 0.9
    """SGD's momentum; AdamW's first beta."""
    schedule: str = "cosine"
    """cosine (to zero at the last step) | constant."""
    warmup_steps: int = 10


@dataclass
class TrainerConfig:
    """The one loop."""

    steps: int = 150
    """Optimizer steps; each sees one logical batch."""
    batch_size: int = 2
    """Examples of a logical batch."""
    micro_batch_size: int | None = None
    """Examples that pass through the model at once (null: the whole batch); changes memory and time alone."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    seed: int = 0
    device: str = "auto"
    """auto (a GPU where there is one) | cpu | cuda | cuda:1 ..."""
    precision: str = "float32"
    """float32 | bfloat16 (autocast; the reversible stream stays in float32)."""
    evaluate_every: int = 0
    """Steps between evaluations on the held-out cases; 0 evaluates at the end."""
    checkpoint_every: int = 50
    """Steps between checkpoints; the last step always leaves one."""
    resume: str | None = None
    """A checkpoint/ folder to continue from."""


@dataclass
class ProfilerConfig:
    """How the run's memory is measured."""

    record_steps: int = 2
    """Training steps, from the first on, that the recorder watches; the others run at full speed."""
    compare: list[str] = field(default_factory=list)
    """Memory modes that are measured beside the run's own, on its first batch and its own model."""


@dataclass
class Config:
    """A whole run."""

    task: str = MISSING
    """segmentation."""
    data: Any = MISSING
    model: Any = MISSING
    memory: MemoryConfig = MISSING
    privacy: PrivacyConfig = MISSING
    trainer: TrainerConfig = MISSING
    profiler: ProfilerConfig = MISSING


def register() -> None:
    """Make the schemas known to Hydra, by the names that `conf/` starts from."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, name, node in (
        ("data", "phantom", PhantomData),
        ("data", "brats", BratsData),
        ("model", "rev_unet", UNetModel),
        ("memory", "memory", MemoryConfig),
        ("privacy", "privacy", PrivacyConfig),
        ("trainer", "trainer", TrainerConfig),
        ("profiler", "profiler", ProfilerConfig),
    ):
        store.store(group=group, name=f"{name}_schema", node=node)


def conf_dir() -> Path:
    """The folder `conf/`: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "conf", package / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"no conf/ folder was found beside or inside {package}; install memsave again")


def compose(overrides: Sequence[str]) -> DictConfig:
    """Compose the config that the overrides select; ConfigError says what is wrong with them."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            config = hydra_compose("config", overrides=list(overrides))
            _refuse_added_keys(config)
            to_objects(config)
            return config
        except MissingConfigException as error:
            raise ConfigError(_missing_option(error)) from error
        except ConfigCompositionException as error:
            raise ConfigError(_bad_override(error)) from error
        except OverrideParseException as error:
            raise ConfigError(f"{error.override!r} cannot be read; overrides have the form key=value") from error
        except ConfigError:
            raise
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise ConfigError(_first_line(error)) from error


def to_objects(config: DictConfig) -> Config:
    """The composed config as dataclasses; ConfigError for a value that must be given and was not."""
    try:
        plain = OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no value; give one, as in {error.full_key}=...") from error
    assert isinstance(plain, Config)
    _check(plain)
    return plain


def _check(config: Config) -> None:
    """Refuse, before anything runs, what types alone let through."""
    _check_choices(config)
    _check_numbers(config)
    if len(config.data.crop_size) != 3:
        raise ConfigError(
            f"data.crop_size is {config.data.crop_size}; give three numbers, as in data.crop_size=[48,48,48]"
        )
    if isinstance(config.data, PhantomData) and len(config.data.size) != 3:
        raise ConfigError(f"data.size is {config.data.size}; give three numbers, as in data.size=[96,96,80]")
    if isinstance(config.data, BratsData) and not config.data.root:
        raise ConfigError("data.root is not given; name the folder of the cases, as in data.root=/my/BraTS2021")


def _check_choices(config: Config) -> None:
    trainer, modes = config.trainer, ("stored", "checkpoint", "reversible")
    for key, value, valid in (
        ("task", config.task, ("segmentation",)),
        ("memory.mode", config.memory.mode, modes),
        ("model.skip", config.model.skip, ("add", "concat")),
        ("trainer.precision", trainer.precision, ("float32", "bfloat16")),
        ("trainer.optimizer.name", trainer.optimizer.name, ("adamw", "sgd")),
        ("trainer.optimizer.schedule", trainer.optimizer.schedule, ("cosine", "constant")),
        *(("profiler.compare", mode, modes) for mode in config.profiler.compare),
        # a kind is chosen by choosing the group's option, which brings the schema along
        *((f"{name}.kind", getattr(config, name).kind, (type(getattr(config, name)).kind,)) for name in KINDS),
    ):
        if value not in valid:
            raise ConfigError(f"{key} is {value!r}; choose one of {', '.join(valid)}{_closest(value, valid)}")


def _check_numbers(config: Config) -> None:
    data, model, trainer, optimizer = config.data, config.model, config.trainer, config.trainer.optimizer
    most = float("inf")
    for key, number, least, limit in (
        ("data.validation_fraction", data.validation_fraction, 0.001, 0.999),
        ("data.split_seed", data.split_seed, 0, most),
        ("data.workers", data.workers, 0, most),
        ("data.cache_bytes", data.cache_bytes, 0, most),
        *(("data.crop_size", voxels, 1, most) for voxels in data.crop_size),
        ("model.expansion", model.expansion, 1, most),
        ("model.squeeze_excitation", model.squeeze_excitation, 0, most),
        ("model.dropout", model.dropout, 0, 0.999),
        ("trainer.steps", trainer.steps, 1, most),
        ("trainer.batch_size", trainer.batch_size, 1, most),
        ("trainer.micro_batch_size", 1 if trainer.micro_batch_size is None else trainer.micro_batch_size, 1, most),
        ("trainer.seed", trainer.seed, 0, most),
        ("trainer.evaluate_every", trainer.evaluate_every, 0, most),
        ("trainer.checkpoint_every", trainer.checkpoint_every, 1, most),
        ("trainer.optimizer.lr", optimizer.lr, 0, most),
        ("trainer.optimizer.weight_decay", optimizer.weight_decay, 0, most),
        ("trainer.optimizer.momentum", optimizer.momentum, 0, 0.999999),
        ("trainer.optimizer.warmup_steps", optimizer.warmup_steps, 0, most),
        ("profiler.record_steps", config.profiler.record_steps, 1, most),
    ):
        if not least <= number <= limit:
            above = "" if limit == most else f" and at most {limit:g}"
            raise ConfigError(f"{key} is {number}; it must be at least {least:g}{above}")


def _refuse_added_keys(config: DictConfig, path: str = "") -> None:
    """Hydra's +key=value adds to a schema; a key that nothing reads would be a setting that does nothing."""
    names = _fields_of(OmegaConf.get_type(config))
    for key in map(str, config):
        if names and key not in names:
            raise ConfigError(_unknown_key(f"{path}{key}", names))
        if not OmegaConf.is_missing(config, key) and isinstance(config[key], DictConfig):
            _refuse_added_keys(config[key], f"{path}{key}.")


def _unknown_key(path: str, names: Sequence[str]) -> str:
    parent, _, key = path.rpartition(".")
    where = f" in {parent}" if parent else ""
    return f"{path} is not known; valid{where} are {', '.join(names)}{_closest(key, names)}"


def _missing_option(error: MissingConfigException) -> str:
    """A group has no such option."""
    group, _, option = str(error.missing_cfg_file or "").rpartition("/")
    options = [name for name in error.options or () if not name.endswith("_schema")]
    if not group:
        return _first_line(error)
    return f"{group}={option} is not known; choose one of {', '.join(options)}{_closest(option, options)}"


def _bad_override(error: ConfigCompositionException) -> str:
    """A key that no schema has, a value of another type, a group that does not exist, or one that was not chosen."""
    cause = error.__cause__
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and cause.full_key:
        return _unknown_key(cause.full_key, _fields_of(cause.object_type) or GROUPS)
    if isinstance(cause, ValidationError):
        return f"{cause.full_key!s}: {_first_line(cause)}{_expected(cause)}"
    message = _first_line(error)
    if "Could not override" in message and "'" in message:
        key = message.split("'")[1].split("@")[0]
        return f"{key} is not known; the groups are {', '.join(GROUPS)}{_closest(key, GROUPS)}"
    if "You must specify 'experiment'" in message:
        names = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))
        return f"no experiment is chosen; give experiment=NAME with one of {', '.join(names)}"
    return message


def _fields_of(schema: Any) -> list[str]:
    return [f.name for f in fields(schema)] if schema is not None and is_dataclass(schema) else []


def _expected(error: ValidationError) -> str:
    """The declared type of the field and its default, where the error knows them."""
    name = (error.full_key or "").rpartition(".")[2].partition("[")[0]
    for known in fields(error.object_type) if is_dataclass(error.object_type) else ():
        if known.name == name:
            kind = known.type if isinstance(known.type, str) else getattr(known.type, "__name__", str(known.type))
            default = known.default if known.default is not MISSING_DEFAULT else ""
            return f"; expected {kind}" + (f", as in {error.full_key}={default}" if default not in ("", None) else "")
    return ""


def _closest(word: str, names: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(names), n=1, cutoff=0.5)
    return f" (did you mean {match[0]}?)" if match else ""


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
