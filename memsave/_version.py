"""The version of memsave."""

__version__ = "0.1.0"
