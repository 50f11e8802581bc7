"""The package's exceptions, warnings and notes.

Each may name the options that it is about, by their names in the library: ``BlendedError("…", option="dtype")``. The text itself names no control
of a surface; the terminal adds its flag, a node the name of its input (:func:`with_controls`). Every text passes :func:`one_line`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

LONGEST_VALUE = 80
"""Characters of a value in a message."""
MAX_MESSAGE = 480
"""Characters of a message of a surface; at most 500 with its prefix, such as 'Blended Diffusion: '."""
MAX_TEXT = 1000
"""Characters of the text of an exception, a warning or a note, which a script may want whole, with long paths."""
MAX_REASON = 160
"""Characters that a message takes from the text of another library."""
_BREAKS = re.compile(r"[\t\n\v\f\r\x1c-\x1f\x85\u2028\u2029]+")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, which begin escape sequences of terminals; characters that reverse the direction of text; bytes that are not UTF-8."""
_GAP = " … "


def one_line(text: object, limit: int | None = MAX_MESSAGE) -> str:
    """Text that may be printed or logged, whatever it was made from: names of files and tensors, prompts, metadata, texts of other libraries.

    Line breaks and tabs become spaces, other control characters �. A text with more than ``limit`` characters loses its middle, because messages begin
    with what is wrong and end with what to do.
    """
    line = _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", _BREAKS.sub(" ", str(text)))
    if limit is None or len(line) <= limit:
        return line
    end = (limit - len(_GAP)) // 3
    return line[: limit - len(_GAP) - end] + _GAP + line[-end:]


def reason(error: BaseException) -> str:
    """The first line of another library's error, short and printable; the name of its type where it has no text. For the end of a clause."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return one_line(lines[0].rstrip("."), MAX_REASON)


def _names(option: str | Sequence[str]) -> tuple[str, ...]:
    return (option,) if isinstance(option, str) else tuple(option)


class BlendedError(ValueError):
    """An error that the user can fix: the message says what was wrong, with the values, and what to do.

    Args:
        text: one or more sentences.
        option: name of the option that the message is about, or several names.
    """

    def __init__(self, text: str, option: str | Sequence[str] = ()) -> None:
        super().__init__(one_line(text, MAX_TEXT))
        self.options = _names(option)


class OutOfMemoryError(BlendedError):
    """Not even the smallest unit of work fits into memory."""


class BlendedWarning(UserWarning):
    """A fact that the user should know, though the work continues. Arguments as for :class:`BlendedError`."""

    def __init__(self, text: str, option: str | Sequence[str] = ()) -> None:
        super().__init__(one_line(text, MAX_TEXT))
        self.options = _names(option)


class Note(str):
    """A sentence about a finished run, and the options that it is about. Arguments as for :class:`BlendedError`."""

    options: tuple[str, ...]

    def __new__(cls, text: str, option: str | Sequence[str] = ()) -> Note:
        note = super().__new__(cls, one_line(text, MAX_TEXT))
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
        'strength is 2; … (--strength).', one printable line; without the part in parentheses where the surface has no control for any of the options.
    """
    text = one_line(message)
    controls = [name for option in getattr(message, "options", ()) if (name := control(option)) is not None]
    if not controls:
        return text
    return one_line(f"{text.rstrip().removesuffix('.')} ({', '.join(dict.fromkeys(controls))}).")
