"""Files that are written completely or not at all, the check of an input file, and hashes of files."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import BlendedError

HIDDEN = ".blended-"
"""Begins the names of hidden folders."""
LOCK = "blended-diffusion.lock"
"""In the hidden folder of a file that is being written: locked while its process lives."""
ABANDONED_SECONDS = 2.0
"""Age of a hidden folder before it is taken for abandoned: its process may be about to lock it."""
LONGEST_PATH = 120


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write to. It replaces ``path`` at the end; after an error it is deleted and ``path`` is unchanged.

    Other programs see either the old file or the complete new one, after a power failure too. The temporary file is in a hidden folder beside ``path``,
    with whatever the writing library puts beside it. What a killed process has left there is deleted by the next call.
    """
    remove_abandoned(path.parent)
    folder = Path(tempfile.mkdtemp(".part", HIDDEN, path.parent))
    lock, part = FileLock(folder / LOCK), folder / path.name
    try:
        with contextlib.suppress(NotImplementedError):  # a file system without locks; nothing is deleted there
            lock.acquire()
        part.touch()
        mode = part.stat().st_mode  # the default mode; some writers replace the file by one with a private mode
        yield part
        part.chmod(mode)
        _to_disk(part)
        os.replace(part, path)
        _to_disk(path.parent)
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(folder: Path) -> None:
    """Deletes what killed processes have left in a folder while they wrote files."""
    for hidden in folder.glob(f"{HIDDEN}*.part"):
        lock = hidden / LOCK
        with contextlib.suppress(OSError, NotImplementedError, Timeout):
            if hidden.is_symlink() or not lock.is_file() or time.time() - hidden.stat().st_mtime < ABANDONED_SECONDS:
                continue
            with FileLock(lock, timeout=0):
                pass
            shutil.rmtree(hidden, ignore_errors=True)


def _to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name != "posix":  # only there a folder can be opened
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        with contextlib.suppress(OSError):  # a file system that cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a complete file, and creates its folder if needed. An OSError names the file, also one of a full disk."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_bytes(data)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


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
