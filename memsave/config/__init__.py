"""Configuration of a run: the schema of each config group, composition by Hydra, and readable errors."""

from memsave.config.errors import ConfigError

__all__ = ["ConfigError"]
