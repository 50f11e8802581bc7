"""The package's own exception."""


class BlendedError(ValueError):
    """Something a person can mend: the message says what was wrong, with the values, and what to do."""


class MemoryRanOut(BlendedError):
    """Not even the least that could be done at once fits into memory."""


class BlendedWarning(UserWarning):
    """Something a person should know, though the work goes on."""
