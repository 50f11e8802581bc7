"""The package's own exception."""


class BlendedError(ValueError):
    """Something a person can mend: the message says what was wrong, with the values, and what to do."""


class BlendedWarning(UserWarning):
    """Something a person should know, though the work goes on."""
