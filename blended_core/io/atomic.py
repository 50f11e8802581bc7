"""Files that are written completely or not at all, and hashes of files."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path


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
    """Writes a complete file, and creates its folder if needed. An OSError names the file, also one of a full disk."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_bytes(data)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
