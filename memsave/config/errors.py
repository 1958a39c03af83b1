"""The error for invalid configurations."""


class ConfigError(ValueError):
    """An invalid configuration; the message is one sentence that names the key and the remedy."""
