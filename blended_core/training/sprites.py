"""Renders the objects of the embedded world from Noto Color Emoji into one sprite sheet.

Requires the Debian package fonts-noto-color-emoji: ``python -m blended_core.training.sprites [FONT]``. The sprite sheet is in the
repository, so only changes to it need the font. The font is © Google Inc., under the SIL Open Font License 1.1.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..toy.world import OBJECTS, SHEET_COLUMNS, SPRITE_SIDE, SPRITES_PATH

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
STRIKE = 109  # px, the only size of the bitmaps in the font


def draw_sprite(font: ImageFont.FreeTypeFont, glyph: str) -> Image.Image:
    """One glyph, cropped to its visible pixels and centered in a transparent square of SPRITE_SIDE pixels."""
    canvas = Image.new("RGBA", (2 * STRIKE, 2 * STRIKE))
    ImageDraw.Draw(canvas).text((STRIKE // 4, STRIKE // 4), glyph, font=font, embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    if box is None:
        raise SystemExit(f"the font has no glyph for {glyph!r}")
    glyph_image = canvas.crop(box)
    scale = SPRITE_SIDE / max(glyph_image.size)
    glyph_image = glyph_image.resize((round(glyph_image.width * scale), round(glyph_image.height * scale)), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (SPRITE_SIDE, SPRITE_SIDE))
    square.paste(glyph_image, ((SPRITE_SIDE - glyph_image.width) // 2, (SPRITE_SIDE - glyph_image.height) // 2))
    return square


def main(path: str = FONT) -> None:
    """Writes the sprite sheet: the objects in the order of ``world.OBJECTS``, row by row."""
    font = ImageFont.truetype(path, STRIKE)
    rows = -(-len(OBJECTS) // SHEET_COLUMNS)
    sheet = Image.new("RGBA", (SHEET_COLUMNS * SPRITE_SIDE, rows * SPRITE_SIDE))
    for i, thing in enumerate(OBJECTS.values()):
        sheet.paste(draw_sprite(font, thing.glyph), (i % SHEET_COLUMNS * SPRITE_SIDE, i // SHEET_COLUMNS * SPRITE_SIDE))
    Path(SPRITES_PATH).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(SPRITES_PATH, optimize=True)
    print(f"{SPRITES_PATH}: {len(OBJECTS)} objects, {Path(SPRITES_PATH).stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    main(*sys.argv[1:2])
