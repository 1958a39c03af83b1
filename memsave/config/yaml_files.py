"""Reading YAML files that a stranger may have written: the `config.yaml` of a run."""

import io
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf


def read_yaml(path: Path) -> Any:
    """The content of a YAML file as a config. Raises OSError, ValueError, or an error of YAML or OmegaConf.

    Aliases are refused: each repeats a value, so that ten lines become gigabytes, and no config of a run has one.
    """
    text = path.read_text()
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=yaml.SafeLoader)):
            raise ValueError("it contains aliases")
        return OmegaConf.load(io.StringIO(text))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
