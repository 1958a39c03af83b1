"""The error of every configuration that cannot run."""


class ConfigError(ValueError):
    """A configuration that cannot run; its message is one sentence for the person who wrote it."""
