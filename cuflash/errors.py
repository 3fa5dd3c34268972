"""The one exception class of its own that cuflash has."""


class UnsupportedError(RuntimeError):
    """The request is valid, but this GPU, build or installation cannot serve it; the message says what to do."""
