"""The terminal: ``blended-diffusion demo``, ``edit``, ``inspect``, ``convert`` and ``evaluate``."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of ``blended-diffusion``; returns the exit code."""
    from ..timer import Timer

    timer = Timer()  # before the imports, which belong to the time of a run
    from .app import main as run

    return run(argv, timer)
