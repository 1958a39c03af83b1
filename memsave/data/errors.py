"""The one exception of `memsave.data`."""


class DataError(ValueError):
    """Data that cannot be used as it is: the message is one sentence that names what is wrong and the remedy."""
