"""The formats of result files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

JPEG_QUALITY = 95
FAST = "fast"
PNG_COMPRESSIONS = (FAST, *map(str, range(10)))
"""Names of how hard a PNG file is compressed; the pixels are the same."""
RUN_LENGTHS = 3
"""Z_RLE of zlib."""


@dataclass(frozen=True)
class FileFormat:
    """A format of result files. ``max_side``: largest width and height in pixels."""

    pillow: str
    lossless: bool = True
    alpha: bool = True
    max_side: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def png_options(compression: str) -> dict[str, int]:
    """Pillow's options for one of :data:`PNG_COMPRESSIONS`: a level of zlib, of which Pillow's default is 6, or ``fast``.

    ``fast`` looks for runs of one byte only. Of a photograph, whose rows are differences of neighbors, a search for longer repetitions finds little:
    the file is about as large as that of level 6, in the time of level 1. Drawings and screenshots need a level to become small.
    """
    return {"compress_type": RUN_LENGTHS, "compress_level": 1} if compression == FAST else {"compress_level": int(compression)}


FORMATS: dict[str, FileFormat] = {
    "png": FileFormat("PNG"),
    "jpg": FileFormat("JPEG", lossless=False, alpha=False, max_side=65500, options={"quality": JPEG_QUALITY, "subsampling": 0}),
    "webp": FileFormat("WEBP", max_side=16383, options={"lossless": True, "exact": True}),
    # Without compression: Pillow's compressed TIFF files cannot hold EXIF data.
    "tiff": FileFormat("TIFF"),
}
"""The formats of results, by the suffix of their files."""
