"""What a picture file holds beside its pixels, and which of it a format can hold."""

from __future__ import annotations

import io
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

from ..errors import BlendedError
from .formats import FAST, FORMATS, png_options

ORIENTATION, EXIF_IFD, USER_COMMENT = 0x0112, 0x8769, 0x9286
_X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT, _INCHES = 0x011A, 0x011B, 0x0128, 2
_EXIF_WIDTH, _EXIF_HEIGHT = 0xA002, 0xA003
_PNG_XMP = "XML:com.adobe.xmp"
_COMMENT = "Comment"
_OF_THE_PIXELS = frozenset(
    {254, 255, 256, 257, 258, 259, 262, 263, 264, 265, 266, 273, 277, 278, 279, 280, 281, 284, 288, 289, 290, 291, 292, 293, 301, 317, 318, 319,
     320, 321, 322, 323, 324, 325, 330, 332, 333, 334, 336, 338, 339, 340, 341, 342, 347, 700, 34675}
    | set(range(512, 533))
)  # fmt: skip
"""TIFF tags that describe how pixels are stored, or that are kept in another way (XMP, the color profile). They are not true of another file."""
_ASCII = b"ASCII\0\0\0"
"""The mark of the character set of a user comment."""
_MAX_DPI = 1e6
_MAX_EXIF = 65_000
"""Bytes of EXIF data that fit into the one segment of a JPEG file."""


@dataclass(frozen=True)
class Metadata:
    """What a picture file holds beside its pixels and its color profile.

    Attributes:
        exif: EXIF data for an upright picture, without the thumbnail, which would show the picture before the edit.
        xmp: an XMP packet for an upright picture.
        dpi: pixels per inch, horizontal and vertical.
        chunks: of a PNG file, those that say what its values mean: gAMA, cHRM, sRGB.
        text: entries of a PNG file; the comment of a JPEG or GIF file under 'Comment'.
    """

    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    chunks: Mapping[str, bytes] = field(default_factory=dict)
    text: Mapping[str, str] = field(default_factory=dict)


def metadata_of(image: Image.Image, size: tuple[int, int], name: str) -> tuple[Metadata, list[str]]:
    """The metadata of an open file, and notes about what is damaged.

    Args:
        image: as Pillow opened it. size: of the upright picture.
        name: of the file, for the notes.
    """
    notes: list[str] = []
    try:
        exif = _upright_exif(image.getexif(), size)
    except Exception:  # Pillow raises many kinds for damaged data
        exif = None
        notes.append(f"the EXIF data of {name} is damaged; it is not kept.")
    info: dict[Any, Any] = image.info
    chunks: dict[str, bytes] = {}
    gamma = info.get("gamma", 0)
    if _is_number(gamma) and 0 < gamma < 1000:
        chunks["gAMA"] = struct.pack(">I", round(gamma * 100_000))
    white = info.get("chromaticity")
    if isinstance(white, tuple) and len(white) == 8 and all(_is_number(v) and 0 <= v < 1000 for v in white):
        chunks["cHRM"] = struct.pack(">8I", *(round(v * 100_000) for v in white))
    if info.get("srgb") in (0, 1, 2, 3):
        chunks["sRGB"] = bytes([info["srgb"]])
    return Metadata(exif, _upright_xmp(info), _dpi(info), chunks, _text(image)), notes


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _upright_exif(exif: Image.Exif, size: tuple[int, int]) -> bytes | None:
    for tag in _OF_THE_PIXELS & set(exif):
        del exif[tag]
    if not set(exif) - {ORIENTATION}:
        return None
    if ORIENTATION in exif:
        exif[ORIENTATION] = 1
    inner = exif.get_ifd(EXIF_IFD)
    if _EXIF_WIDTH in inner:
        inner[_EXIF_WIDTH], inner[_EXIF_HEIGHT] = size
    return exif.tobytes()


def _upright_xmp(info: Mapping[Any, Any]) -> bytes | None:
    xmp = info.get("xmp") or info.get(_PNG_XMP)
    data = xmp.encode() if isinstance(xmp, str) else xmp
    if not isinstance(data, bytes):
        return None
    return re.sub(rb'(tiff:Orientation(?:="|>))[2-8]', rb"\g<1>1", data)


def _dpi(info: Mapping[Any, Any]) -> tuple[float, float] | None:
    try:
        x, y = (float(value) for value in info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return (x, y) if 0 < x < _MAX_DPI and 0 < y < _MAX_DPI else None


def _text(image: Image.Image) -> dict[str, str]:
    entries = getattr(image, "text", None) or {}
    # The raw profile is EXIF data in another form, with the orientation before it was applied.
    text = {
        str(k): str(v)
        for k, v in entries.items()
        if k != _PNG_XMP and not str(k).startswith(("Raw profile type exif", "Raw profile type APP1"))
    }
    comment = image.info.get("comment")
    if isinstance(comment, bytes) and comment:
        text.setdefault(_COMMENT, comment.decode("utf-8", "replace"))
    return text


def fitted(
    metadata: Metadata, icc: bytes | None, size: tuple[int, int], alpha: bool, format: str
) -> tuple[Metadata, bytes | None, list[str]]:
    """(what of it a format can hold, and the color profile; notes about the rest).

    Args:
        metadata, icc: of the source. size: (width, height) in pixels. alpha: whether the picture has an alpha channel.
        format: a name of :data:`FORMATS`.

    Raises:
        BlendedError: if the format cannot hold a picture of that size.
    """
    kind, notes = FORMATS[format], []
    if kind.max_side is not None and max(size) > kind.max_side:
        raise BlendedError(
            f"the picture is {size[0]}×{size[1]} and a {format} file holds at most {kind.max_side} pixels per side; choose png or tiff.",
            "format",
        )
    if not kind.lossless:
        notes.append(f"{format} files are lossy: pixels outside the mask change a little too. png, webp and tiff keep them exactly.")
    if alpha and not kind.alpha:
        notes.append(f"{format} files have no transparency; it is left out.")
    missing: list[str] = []
    if format != "png":
        comment = {k: v for k, v in metadata.text.items() if k == _COMMENT} if format == "jpg" else {}
        missing += ["text entries"] if len(comment) < len(metadata.text) else []
        missing += ["gamma"] if "gAMA" in metadata.chunks else []
        metadata = replace(metadata, text=comment, chunks={})
    # One pixel shows what Pillow refuses, before the time of an edit is spent.
    for name, label in (("text", "text entries"), ("xmp", "XMP data"), ("exif", "EXIF data"), ("dpi", "resolution"), ("chunks", "gamma")):
        value: Any = getattr(metadata, name)
        if value and not _can_be_written(Metadata(**{name: value}), None, format):
            missing.append(label)
            metadata = replace(metadata, **{name: getattr(Metadata(), name)})
    if icc is not None and not _can_be_written(Metadata(), icc, format):
        missing.append("color profile")
        icc = None
    if missing:
        notes.append(f"{format} files cannot hold the {' and the '.join(dict.fromkeys(missing))} of the picture; the results are without.")
    return metadata, icc, notes


def _can_be_written(metadata: Metadata, icc: bytes | None, format: str) -> bool:
    try:
        encoded(np.zeros((1, 1, 3), np.uint8), format, metadata, icc)
    except Exception:  # Pillow raises many kinds for data that does not fit
        return False
    return True


def encoded(
    pixels: Any, format: str, metadata: Metadata, icc: bytes | None, text: Mapping[str, str] | None = None, png_compression: str = FAST
) -> bytes:
    """A complete file.

    Args:
        pixels: uint8 [H, W, 3], or [H, W, 4] with an alpha channel, which a format without one leaves out.
        format: a name of :data:`FORMATS`. metadata, icc: as :func:`fitted` returns them.
        text: further text entries; in a format other than PNG they are the EXIF user comment, unless the source has one or they are too long.
        png_compression: as in :func:`~blended_core.io.formats.png_options`.
    """
    kind, arguments = FORMATS[format], dict(FORMATS[format].options)
    exif, xmp = metadata.exif, metadata.xmp
    if icc:
        arguments["icc_profile"] = icc
    if metadata.dpi and format == "webp":
        exif = _with_resolution(exif, metadata.dpi)
    elif metadata.dpi:
        arguments["dpi"] = metadata.dpi
    if format == "png":
        arguments |= png_options(png_compression)
        chunks = PngImagePlugin.PngInfo()
        for name, data in metadata.chunks.items():
            chunks.add(name.encode(), data)
        for key, value in {**metadata.text, **(text or {}), **({_PNG_XMP: xmp.decode("utf-8", "replace")} if xmp else {})}.items():
            chunks.add_itxt(key, value)
        arguments["pnginfo"] = chunks
    else:
        exif = _with_comment(exif, text) if text else exif
        if _COMMENT in metadata.text:
            arguments["comment"] = metadata.text[_COMMENT].encode()
        if xmp and format == "tiff":
            exif = _with_tag(exif, 700, xmp)
        elif xmp:
            arguments["xmp"] = xmp
    if exif:
        arguments["exif"] = exif
    image = Image.fromarray(pixels if kind.alpha else np.ascontiguousarray(pixels[..., :3]))
    buffer = io.BytesIO()
    image.save(buffer, kind.pillow, **arguments)
    return buffer.getvalue()


def _loaded(exif: bytes | None) -> Image.Exif:
    out = Image.Exif()
    if exif:
        out.load(exif)
    return out


def _with_tag(exif: bytes | None, tag: int, value: Any) -> bytes:
    out = _loaded(exif)
    out[tag] = value
    return out.tobytes()


def _with_resolution(exif: bytes | None, dpi: tuple[float, float]) -> bytes:
    out = _loaded(exif)
    if _X_RESOLUTION not in out:
        out[_X_RESOLUTION], out[_Y_RESOLUTION], out[_RESOLUTION_UNIT] = dpi[0], dpi[1], _INCHES
    return out.tobytes()


def _with_comment(exif: bytes | None, text: Mapping[str, str]) -> bytes | None:
    out = _loaded(exif)
    inner = out.get_ifd(ExifTags.IFD.Exif)
    comment = _ASCII + "\n".join(f"{key}: {value}" for key, value in text.items()).encode("ascii", "backslashreplace")
    before = inner.get(USER_COMMENT)
    if before and not (isinstance(before, bytes) and before.startswith(_ASCII + next(iter(text)).encode())):
        return exif  # the comment of a person; one of an earlier edit of this picture is replaced
    if ExifTags.IFD.Exif not in out:
        out[ExifTags.IFD.Exif] = inner
    inner[USER_COMMENT] = comment
    data = out.tobytes()
    return data if len(data) <= _MAX_EXIF else exif
