"""Configuration of a run: schemas of the config groups, a registry of components, and composition by Hydra.

schema      the groups that every run has: memory, privacy, audit, trainer, profiler
registry    data sets, models and tasks by name, including those of other packages
fields      constraints of keys: choices and ranges
compose     from overrides to a checked, frozen `Config`, with one-sentence errors
checks      invalid combinations of keys
"""

from memsave.config.errors import ConfigError
from memsave.config.fields import option
from memsave.config.registry import register, register_experiment
from memsave.config.schema import AdapterConfig, Config, DataConfig, ModelConfig, TaskConfig

__all__ = [
    "AdapterConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "ModelConfig",
    "TaskConfig",
    "option",
    "register",
    "register_experiment",
]
