"""The package's exceptions, warnings and notes.

Each may name the options that it is about, by their names in the library: ``BlendedError("…", option="dtype")``. The text itself names no control
of a surface; the terminal adds its flag, a node the name of its input (:func:`with_controls`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

LONGEST_VALUE = 80
"""Characters of a value in a message."""


def _names(option: str | Sequence[str]) -> tuple[str, ...]:
    return (option,) if isinstance(option, str) else tuple(option)


class BlendedError(ValueError):
    """An error that the user can fix: the message says what was wrong, with the values, and what to do.

    Args:
        text: one or more sentences.
        option: name of the option that the message is about, or several names.
    """

    def __init__(self, text: str, option: str | Sequence[str] = ()) -> None:
        super().__init__(text)
        self.options = _names(option)


class OutOfMemoryError(BlendedError):
    """Not even the smallest unit of work fits into memory."""


class BlendedWarning(UserWarning):
    """A fact that the user should know, though the work continues. Arguments as for :class:`BlendedError`."""

    def __init__(self, text: str, option: str | Sequence[str] = ()) -> None:
        super().__init__(text)
        self.options = _names(option)


class Note(str):
    """A sentence about a finished run, and the options that it is about. Arguments as for :class:`BlendedError`."""

    options: tuple[str, ...]

    def __new__(cls, text: str, option: str | Sequence[str] = ()) -> Note:
        note = super().__new__(cls, text)
        note.options = _names(option)
        return note


def short_repr(value: object) -> str:
    """A value for a message: its repr, of a long one the beginning."""
    try:
        text = repr(value)
    except ValueError:  # a number of thousands of digits
        text = "a very large number"
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"


def with_controls(message: object, control: Callable[[str], str | None]) -> str:
    """The text of an error, a warning or a note, with the controls of a surface.

    Args:
        message: an exception, a warning or a note.
        control: name of an option → the control that a surface has for it, or None if it has none.

    Returns:
        'strength is 2; … (--strength).'; the text alone where the surface has no control for any of the options.
    """
    text = str(message)
    controls = [name for option in getattr(message, "options", ()) if (name := control(option)) is not None]
    if not controls:
        return text
    return f"{text.rstrip().removesuffix('.')} ({', '.join(dict.fromkeys(controls))})."
