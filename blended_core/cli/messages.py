"""Errors and notes as the terminal prints them."""

from __future__ import annotations

import argparse
import sys

from ..errors import BlendedError, with_controls


def message_of(error: BaseException, args: argparse.Namespace) -> str:
    """The sentence for an exception of any kind, with the flags of the options that it is about."""
    if isinstance(error, BlendedError):
        return with_controls(error, args.flags.get)
    if isinstance(error, KeyboardInterrupt):
        return "Ctrl-C."
    from ..memory import is_out_of_memory  # imports torch

    if is_out_of_memory(error):
        return "the device ran out of memory; try --batch 1, --dtype bf16 or --device cpu."
    if isinstance(error, OSError):
        return f"{error.strerror or error}: {error.filename or 'file system'}."
    kind = type(error).__name__
    return f"{kind if isinstance(error, RuntimeError) else f'unexpected {kind}'}: {error}. Add --debug to see where it happened."


def print_note(note: object, args: argparse.Namespace) -> None:
    """Prints a note or a warning to stderr, with the flags of the options that it is about."""
    print(f"note: {with_controls(note, args.flags.get)}", file=sys.stderr)
