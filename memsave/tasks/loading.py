"""Loading a trained model from the `model/` of a run, for scripts (`memsave.load`) and for prediction."""

from pathlib import Path
from typing import Any

from memsave.config import ConfigError
from memsave.config.compose import load as load_config
from memsave.files import parse_json

CONFIG, WEIGHTS, ADAPTER = "config.json", "model.safetensors", "adapter_config.json"
AUTO_CLASSES = {
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
}
"""The class of transformers that loads a language model, by the end of its architecture's name in config.json."""


def load_model(folder: str | Path) -> Any:
    """The trained model in a run's folder or in a copy of its `model/`, in eval mode on the CPU."""
    folder = Path(folder).expanduser()
    released = _released(folder)
    return load_unet(folder) if released is None or not _is_language(released) else _language_model(released)


def load_unet(folder: Path) -> Any:
    """A trained U-Net in eval mode, with its `UNetConfig` as `config`. Raises ConfigError if the folder has none.

    Runs of older versions have no `config.json`, and unfinished runs have only a checkpoint. These networks are built
    from the run's `config.yaml`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from memsave.tasks.segmentation.unet_config import UNetConfig

    released = _released(folder)
    if released is None:
        weights, network, config = _from_run(folder)
    elif _is_language(released):
        raise ConfigError(f"{folder} holds a language model, not a U-Net; give a run of task=segmentation")
    else:
        weights, config = released / WEIGHTS, UNetConfig.read(released / CONFIG)
        network = config.build()
    if not weights.is_file():
        raise ConfigError(f"{weights.parent} holds no {WEIGHTS}; copy the model's folder again")
    try:
        network.load_state_dict(load_file(weights))
    except (RuntimeError, SafetensorError, OSError) as error:
        raise ConfigError(f"{weights} cannot be read as the model of its config; copy the folder again") from error
    network.config = config
    return network.eval()


def _released(folder: Path) -> Path | None:
    """The folder or its `model/`, whichever holds a released model; None if neither does."""
    folders = (folder, folder / "model")
    return next((each for each in folders for name in (CONFIG, ADAPTER) if (each / name).is_file()), None)


def _is_language(released: Path) -> bool:
    """Whether the folder holds a model of transformers or an adapter of one."""
    if (released / ADAPTER).is_file():
        return True
    path = released / CONFIG
    try:
        return "model_type" in parse_json(path.read_text())
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); copy the model's folder again") from error


def _language_model(released: Path) -> Any:
    _register_class(released)
    if (released / ADAPTER).is_file():
        from memsave.tasks.language.adapter_files import load_adapted

        return load_adapted(released)
    import transformers

    import memsave.models.rev_gpt2  # noqa: F401 (registers the class with AutoModelForCausalLM)
    from memsave.tasks.language.pretrained import NO_CODE, readable

    with readable(lambda reason: f"{released} cannot be loaded as a language model ({reason}); copy it again"):
        name = (parse_json((released / CONFIG).read_text()).get("architectures") or [""])[0]
        is_pair = transformers.AutoConfig.from_pretrained(released, **NO_CODE).is_encoder_decoder
        default = "AutoModelForSeq2SeqLM" if is_pair else "AutoModelForCausalLM"
        found = next((each for ending, each in AUTO_CLASSES.items() if name.endswith(ending)), default)
        return getattr(transformers, found).from_pretrained(released, use_safetensors=True, **NO_CODE).eval()


def _register_class(released: Path) -> None:
    """Let transformers know the class of a released model, if it is one of the user's own. Raises ConfigError."""
    from memsave.own_code import read_own_class
    from memsave.tasks.language.pretrained import register_own_class

    target = read_own_class(released)
    if target is not None:
        register_own_class(target)


def _from_run(folder: Path) -> tuple[Path, Any, Any]:
    """(weights, network, its config) of a run without `config.json`, or of a folder inside that run."""
    from memsave.data.volumes.config import SegmentationData
    from memsave.progress import Progress
    from memsave.tasks.definition import definition_of
    from memsave.tasks.segmentation.unet_config import UNetConfig

    run = folder if (folder / "config.yaml").is_file() else folder.parent
    if not (run / "config.yaml").is_file():
        fault = f"holds weights without their {CONFIG}" if (folder / WEIGHTS).is_file() else "holds no trained model"
        raise ConfigError(f"{folder} {fault}; give a run's folder, which has config.yaml, or a copy of its model/")
    config = load_config(run / "config.yaml")
    if not isinstance(config.data, SegmentationData):
        raise ConfigError(f"{run} is an unfinished run of task={config.task.kind}; give a finished run")
    folders = (folder, run / "model", run / "checkpoint")
    weights = next((each / WEIGHTS for each in folders if (each / WEIGHTS).is_file()), None)
    if weights is None:
        raise ConfigError(f"{run} holds no {WEIGHTS} in model/ or checkpoint/; give the folder of a run that saved one")
    network = config.adapter.apply(definition_of(config).make_model(progress=Progress())[0])
    return weights, network, UNetConfig.of(config.data, model=network, precision=config.trainer.precision)
