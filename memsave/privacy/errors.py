"""The error of a request that would not be private as stated."""


class PrivacyError(ValueError):
    """The request would not be private as stated; the message is one sentence."""
