"""The entry point of the terminal: reads the command line, runs the command, prints errors."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from .messages import message_of, print_note
from .parser import build_parser
from .process import FAILED, INTERRUPTED, set_waiting_policy, warnings_to


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code: 0, 2 after an error, 130 after Ctrl-C."""
    set_waiting_policy()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal may be unable to show λ or x̂
    args = build_parser().parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with warnings_to(lambda warning: print_note(warning, args)):
            return _run(args)
    except KeyboardInterrupt as interrupt:
        # A command that has saved results says so in the exception.
        print(f"\n{interrupt}" if str(interrupt) else "\nstopped before a result was finished; nothing was written.", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        print(f"error: {message_of(error, args)}", file=sys.stderr)
        return FAILED


def _run(args: argparse.Namespace) -> int:
    # These import torch, which the parser and --help do not need.
    from . import checkpoints, edit, evaluate

    commands = {
        "demo": edit.demo,
        "edit": edit.edit,
        "inspect": checkpoints.inspect,
        "convert": checkpoints.convert,
        "evaluate": evaluate.evaluate,
    }
    return commands[args.command](args)
