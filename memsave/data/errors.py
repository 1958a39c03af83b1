"""The exception of `memsave.data`."""


class DataError(ValueError):
    """Data that cannot be used; the message is one sentence that names the fault and the remedy."""
