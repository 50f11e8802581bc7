"""What the terminal prints. Everything that a command says passes :func:`say`, so that no control character and no endless line reaches the terminal."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys

from ..errors import MAX_MESSAGE, BlendedError, one_line, reason, with_controls
from .process import StopSignal

READER_IS_GONE = {errno.EPIPE, errno.EIO}
"""Errors of a stream whose reader has ended: a closed pipe, a terminal that has hung up."""


def say(text: str, *, error: bool = False, limit: int | None = MAX_MESSAGE) -> None:
    """Prints text to stdout, or to stderr, each of its lines as :func:`~blended_core.errors.one_line` returns it.

    A run is not lost because nobody reads its messages any more: they are dropped. Raises OSError if the stream cannot be written for another reason.
    """
    stream = sys.stderr if error else sys.stdout
    try:
        print(*(one_line(line, limit) for line in text.split("\n")), sep="\n", file=stream, flush=True)
    except OSError as failure:
        if failure.errno not in READER_IS_GONE:
            failure.filename = "standard error" if error else "standard output"
            raise
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), stream.fileno())


def say_error(text: str) -> None:
    """Prints an error to stderr."""
    say(f"error: {text}", error=True)


def message_of(error: BaseException, args: argparse.Namespace) -> str:
    """The sentence for an exception of any kind, with the flags of the options that it is about."""
    if isinstance(error, BlendedError):
        return with_controls(error, args.flags.get)
    if isinstance(error, KeyboardInterrupt):
        return f"{error.name if isinstance(error, StopSignal) else 'Ctrl-C'}."
    if _is_out_of_memory(error):
        return "the device ran out of memory; try --batch 1, --dtype bf16 or --device cpu."
    if isinstance(error, OSError):
        return one_line(f"{error.strerror or reason(error)}: {error.filename or 'file system'}.")
    kind = type(error).__name__
    return f"{kind if isinstance(error, RuntimeError) else f'unexpected {kind}'}: {reason(error)}. Add --debug to see where it happened."


def _is_out_of_memory(error: BaseException) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from ..memory import is_out_of_memory

    return is_out_of_memory(error)


def print_note(note: object, args: argparse.Namespace) -> None:
    """Prints a note or a warning to stderr, with the flags of the options that it is about."""
    say(f"note: {with_controls(note, args.flags.get)}", error=True)
