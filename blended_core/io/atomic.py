"""Files that are written completely or not at all, the check of an input file, and hashes of files."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from ..errors import BlendedError

LONGEST_PATH = 120


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` to write to. It replaces ``path`` at the end; after an error it is deleted and ``path`` is unchanged.

    Other programs see either the old file or the complete new one.
    """
    # The name holds process and thread, so that two writers of one file use two temporary files.
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        part.touch()
        mode = part.stat().st_mode  # the default mode; some writers replace the file by one with a private mode
        yield part
        part.chmod(mode)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a complete file, and creates its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_bytes(data)


def shown_path(path: Path) -> str:
    """A path as messages show it: control characters escaped, of a long one the end."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))
    return text if len(text) <= LONGEST_PATH else f"…{text[-LONGEST_PATH:]}"


def check_file(path: Path, what: str, option: str | tuple[str, ...] = ()) -> None:
    """Raises BlendedError unless a path is a file that can be read from beginning to end. Opening a named pipe would wait without end.

    Args:
        path: the file.
        what: 'the picture', for the message. option: that names it.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise BlendedError(f"{what} {shown_path(path)} does not exist; check the path.", option) from None
    except (OSError, ValueError) as error:  # too long a name, a folder that may not be read, a null byte
        reason = getattr(error, "strerror", None) or error
        raise BlendedError(f"{what} {shown_path(path)} cannot be opened ({reason}); check the path.", option) from None
    if stat.S_ISDIR(mode):
        raise BlendedError(f"{what} {shown_path(path)} is a folder; give a file.", option)
    if not stat.S_ISREG(mode):
        raise BlendedError(f"{what} {shown_path(path)} is a device, a pipe or a socket; give a file.", option)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
