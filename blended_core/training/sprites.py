"""Renders the embedded world's objects from Noto Color Emoji into one sprite sheet.

Run once, with Debian's fonts-noto-color-emoji installed: ``python -m blended_core.training.sprites [FONT]``. The sheet is
committed, so nobody else needs the font. The font is © Google Inc. under the SIL Open Font License 1.1.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..toy.world import OBJECTS, SHEET_COLUMNS, SPRITE_SIDE, SPRITES_PATH

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
STRIKE = 109  # the only size at which the font's bitmaps exist


def sprite(font: ImageFont.FreeTypeFont, glyph: str) -> Image.Image:
    """One object, cropped to its ink, centred in a transparent square of SPRITE_SIDE pixels."""
    canvas = Image.new("RGBA", (2 * STRIKE, 2 * STRIKE))
    ImageDraw.Draw(canvas).text((STRIKE // 4, STRIKE // 4), glyph, font=font, embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    if box is None:
        raise SystemExit(f"the font has no picture for {glyph!r}")
    ink = canvas.crop(box)
    scale = SPRITE_SIDE / max(ink.size)
    ink = ink.resize((round(ink.width * scale), round(ink.height * scale)), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (SPRITE_SIDE, SPRITE_SIDE))
    square.paste(ink, ((SPRITE_SIDE - ink.width) // 2, (SPRITE_SIDE - ink.height) // 2))
    return square


def main(path: str = FONT) -> None:
    """Writes the sheet, objects in the order of ``world.OBJECTS``, row by row."""
    font = ImageFont.truetype(path, STRIKE)
    rows = -(-len(OBJECTS) // SHEET_COLUMNS)
    sheet = Image.new("RGBA", (SHEET_COLUMNS * SPRITE_SIDE, rows * SPRITE_SIDE))
    for i, thing in enumerate(OBJECTS.values()):
        sheet.paste(sprite(font, thing.glyph), (i % SHEET_COLUMNS * SPRITE_SIDE, i // SHEET_COLUMNS * SPRITE_SIDE))
    Path(SPRITES_PATH).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(SPRITES_PATH, optimize=True)
    print(f"{SPRITES_PATH}: {len(OBJECTS)} objects, {Path(SPRITES_PATH).stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    main(*sys.argv[1:2])
