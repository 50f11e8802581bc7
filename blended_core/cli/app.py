"""The entry point of the terminal: reads the command line, runs the command, prints errors."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from ..timer import Timer
from .messages import message_of, print_note, say, say_error
from .parser import parse
from .process import FAILED, INTERRUPTED, logs_to, open_streams, set_waiting_policy, stop_signals, warnings_to


def main(argv: Sequence[str] | None, timer: Timer) -> int:
    """Runs a command line; returns the exit code: 0, 2 after an error, 130 after Ctrl-C, SIGTERM or SIGHUP. ``timer``: runs since it was called."""
    open_streams()
    set_waiting_policy()
    args = parse(list(sys.argv[1:] if argv is None else argv))
    try:
        with (
            stop_signals(),
            warnings_to(lambda warning: print_note(warning, args)),
            logs_to(lambda text: print_note(text, args)),
        ):
            return _run(args, timer)
    except KeyboardInterrupt as interrupt:
        # A command that has saved results says so in the exception.
        say("\n" + (str(interrupt) or "stopped before a result was finished; nothing was written."), error=True)
        return INTERRUPTED
    except Exception as error:
        if args.debug:
            say(traceback.format_exc().rstrip("\n"), error=True)
        say_error(message_of(error, args))
        return FAILED


def _run(args: argparse.Namespace, timer: Timer) -> int:
    if args.command in ("demo", "edit"):
        from . import request

        return request.demo(args, timer) if args.command == "demo" else request.edit(args, timer)
    if args.command == "evaluate":
        from .evaluate import evaluate

        return evaluate(args)
    from . import checkpoints

    return checkpoints.inspect(args) if args.command == "inspect" else checkpoints.convert(args)
