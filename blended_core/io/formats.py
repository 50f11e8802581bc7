"""The formats of result files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

JPEG_QUALITY = 95


@dataclass(frozen=True)
class FileFormat:
    """A format of result files. ``max_side``: largest width and height in pixels."""

    pillow: str
    lossless: bool = True
    alpha: bool = True
    max_side: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


FORMATS: dict[str, FileFormat] = {
    "png": FileFormat("PNG"),
    "jpg": FileFormat("JPEG", lossless=False, alpha=False, max_side=65500, options={"quality": JPEG_QUALITY, "subsampling": 0}),
    "webp": FileFormat("WEBP", max_side=16383, options={"lossless": True, "exact": True}),
    # Without compression: Pillow's compressed TIFF files cannot hold EXIF data.
    "tiff": FileFormat("TIFF"),
}
"""The formats of results, by the suffix of their files."""
