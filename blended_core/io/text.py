"""Lines of text in any language, drawn into a picture.

Two fonts come with the package: one for Latin, Greek, Cyrillic and symbols, one for Korean, Japanese and Chinese. Each part of a text takes the
first font that has its characters, if need be one of the system. What no font has is written as a name or a code point, never as an empty box.
"""

from __future__ import annotations

import itertools
import unicodedata
from bisect import bisect_right
from functools import lru_cache
from pathlib import Path

from PIL import ImageDraw, ImageFont

from ..errors import BlendedError

OWN_FONTS = tuple(str(Path(__file__).with_name("fonts") / name) for name in ("western.ttf", "eastern.otf"))
SYSTEM_FONTS = (
    "NotoSansCJK-Regular.ttc", "NotoSansThai-Regular.ttf", "NotoSansArabic-Regular.ttf", "NotoSansHebrew-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf", "DejaVuSans.ttf", "FreeSans.ttf", "segoeui.ttf", "seguisym.ttf", "malgun.ttf", "msyh.ttc", "msjh.ttc",
    "YuGothR.ttc", "Nirmala.ttf", "LeelawUI.ttf", "Arial Unicode.ttf", "AppleSDGothicNeo.ttc", "unifont.otf",
)  # fmt: skip
"""Fonts of Linux, Windows and macOS, which Pillow looks for in the usual folders. A missing one is skipped."""
LONGEST_LINE = 2000
"""Characters that are looked at: more do not fit into a line."""
_PROBE_SIZE = 16
_NOT_A_CHARACTER = "\uffff"
_SKIN_TONES = range(0x1F3FB, 0x1F400)


@lru_cache(maxsize=128)
def font(file: str, size: int) -> ImageFont.FreeTypeFont | None:
    """A font at a size in pixels; None if there is no such font."""
    try:
        # The shaping engine, which not every Pillow has, would make pictures differ; the package's fonts need none.
        return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC if file in OWN_FONTS else None)
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=256)
def _missing_glyph(file: str) -> tuple[tuple[int, int], bytes]:
    return _glyph(file, _NOT_A_CHARACTER)


def _glyph(file: str, character: str) -> tuple[tuple[int, int], bytes]:
    found = font(file, _PROBE_SIZE)
    if found is None:
        return (0, 0), b""
    mask = found.getmask(character)
    return mask.size, bytes(mask)


@lru_cache(maxsize=8192)
def font_of(character: str) -> str | None:
    """The first font that has a glyph for a character; None if none has."""
    for file in (*OWN_FONTS, *SYSTEM_FONTS):
        if font(file, _PROBE_SIZE) is not None and _glyph(file, character) != _missing_glyph(file):
            return file
    return None


def readable(text: str) -> str:
    """A text in one line, of characters that some font has; of other symbols the names, '[rocket]', of other characters the code points."""
    out = []
    for c in unicodedata.normalize("NFC", " ".join(text[:LONGEST_LINE].split())):
        kind = unicodedata.category(c)
        if kind == "Cf" or "\ufe00" <= c <= "\ufe0f" or ord(c) in _SKIN_TONES:
            continue  # joins or varies its neighbors, and has no glyph of its own
        if kind[0] != "C" and font_of(c) is not None:
            out.append(c)
        else:
            out.append(f"[{unicodedata.name(c).lower()}]" if kind == "So" else f"[U+{ord(c):04X}]")
    return "".join(out)


def _runs(text: str, size: int) -> list[tuple[str, ImageFont.FreeTypeFont]]:
    """A readable text in parts of one font each."""
    parts = ((file, "".join(characters)) for file, characters in itertools.groupby(text, lambda c: font_of(c) or OWN_FONTS[0]))
    return [(part, found) for file, part in parts if (found := font(file, size)) is not None]


def width_of(text: str, size: int) -> float:
    """The width of a readable text in pixels."""
    return sum(found.getlength(part) for part, found in _runs(text, size))


def fitted(text: str, size: int, width: float) -> str:
    """A readable text, shortened so that it fits into a width in pixels."""
    if width_of(text, size) <= width:
        return text
    # The width grows with the length, so a dozen measurements find the longest beginning that fits.
    count = bisect_right(range(len(text)), width, key=lambda length: width_of(text[:length] + "…", size)) - 1
    return text[: max(count, 0)].rstrip() + "…"


def draw_line(
    draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, color: tuple[int, int, int], width: float
) -> None:
    """Draws a text in one line, its top left corner at ``place``, shortened to ``width`` pixels."""
    x, y = place
    primary = font(OWN_FONTS[0], size)
    if primary is None:
        raise BlendedError("the fonts of the package are missing (blended_core/io/fonts); install the package again.")
    baseline = y + primary.getmetrics()[0]
    for part, found in _runs(fitted(readable(text), size, width), size):
        draw.text((x, baseline), part, color, found, anchor="ls")
        x += found.getlength(part)
