"""Zip archives as PyTorch writes them: nothing in them is compressed, so no entry is larger than the file."""

from __future__ import annotations

import os
import zipfile
from typing import Any, BinaryIO, cast

from ..errors import BlendedError

MAX_DIRECTORY_BYTES = 1 << 23
"""Of the list of entries of an archive: about 100,000 entries."""
LOCAL_HEADER_BYTES = 30


class Archive:
    """The entries of an open zip file.

    Args:
        stream: the file, opened for reading.

    Attributes:
        names: of the entries.

    Raises:
        Exception: of nearly any kind, if the archive is damaged.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.size = os.fstat(stream.fileno()).st_size
        with zipfile.ZipFile(cast(Any, _Limited(stream))) as archive:
            self.entries = {entry.filename: entry for entry in archive.infolist()}
        self.names = list(self.entries)

    @property
    def description(self) -> str:
        """The name of the one data.pkl, which lists the tensors."""
        found = [name for name in self.names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(found) != 1:
            raise ValueError(f"{len(found)} files data.pkl instead of 1")
        return found[0]

    @property
    def is_torchscript(self) -> bool:
        """Whether the archive has a program beside the weights."""
        return any("/code/" in name for name in self.names)

    def locate(self, name: str) -> tuple[int, int]:
        """(position in the file, size) of an entry in bytes; BlendedError if it is compressed."""
        entry = self.entries[name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise BlendedError(
                f"its entry {name} is compressed or encrypted, so its size in memory is unknown. PyTorch never does that: use the original file, "
                "or save it again with torch.save."
            )
        self.stream.seek(entry.header_offset)
        header = self.stream.read(LOCAL_HEADER_BYTES)
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        begin = entry.header_offset + LOCAL_HEADER_BYTES + names
        if not header.startswith(b"PK\x03\x04") or begin + entry.file_size > self.size:
            raise ValueError(f"the entry {name} is incomplete")
        return begin, entry.file_size

    def read(self, name: str, most: int) -> bytes:
        """The first bytes of an entry, ``most`` at most."""
        begin, size = self.locate(name)
        self.stream.seek(begin)
        return self.stream.read(min(size, most))


class _Limited:
    """A file of which not more than a limit is read at once: zipfile reads the list of entries as a whole, and makes objects of it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.seek, self.tell, self.seekable = stream.seek, stream.tell, stream.seekable

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY_BYTES:
            raise ValueError(f"its list of entries has {size} bytes, more than any checkpoint")
        return self.stream.read(size if size >= 0 else MAX_DIRECTORY_BYTES)
