"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import BlendedError


def expanded(path: str | Path) -> Path:
    """A path with a home folder in place of a ~ at its beginning.

    Raises:
        BlendedError: if that home folder is unknown: there is no such user, or the process has neither HOME nor an entry in the list of users.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise BlendedError(f"the home folder in {path} is unknown; write the whole path.") from None


def absolute(path: str | Path) -> Path:
    """The absolute path without symbolic links and ~; errors as for :func:`expanded`."""
    return Path(os.path.realpath(expanded(path)))  # Path.resolve raises RuntimeError for a loop of links
