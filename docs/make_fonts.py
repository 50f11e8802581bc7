"""Makes the fonts of contact sheets: ``uv run --with fonttools python docs/make_fonts.py``.

Requires the Debian packages fonts-dejavu-core and fonts-noto-cjk. The fonts are in the repository, so only a change to them needs these.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fontTools import subset

OUT = Path(__file__).parent.parent / "blended_core" / "io" / "fonts"
DEJAVU = "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf"
NOTO_CJK = "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc"
FULL_NAME, FAMILY, POSTSCRIPT = 4, 1, 6


def decoded(codec: str, rows: Iterable[int]) -> set[int]:
    """The characters in some rows of 94 of a national standard."""
    pairs = (bytes([0xA0 + row, 0xA0 + cell]) for row in rows for cell in range(1, 95))
    return {ord(character) for pair in pairs if len(character := pair.decode(codec, "ignore")) == 1}


# Latin, Greek and Cyrillic with their supplements, punctuation, arrows, mathematical and other symbols.
WESTERN = {*range(0x20, 0x530), *range(0x1E00, 0x1F00), *range(0x2000, 0x20D0), *range(0x2100, 0x2300), *range(0x25A0, 0x2700), 0xFFFD}
# The syllables of KS X 1001, kana, and the first levels of JIS X 0208 and GB 2312: what texts of every day consist of.
HANGUL = {c for c in decoded("euc_kr", range(16, 41)) if 0xAC00 <= c <= 0xD7A3} | set(range(0x3131, 0x318F))
EASTERN = HANGUL | {*range(0x3000, 0x3100), *range(0xFF01, 0xFFEF)} | decoded("euc_jp", range(16, 48)) | decoded("gb2312", range(16, 56))


def make(source: str, characters: set[int], name: str, file: str) -> None:
    """Writes the part of a font that has some characters, under a name of its own, as both licenses ask."""
    options = subset.Options(
        font_number=0 if source.endswith("ttc") else -1, layout_features=[], hinting=False, notdef_outline=True, glyph_names=False
    )
    options.name_IDs = [0, 1, 2, 4, 6, 13, 14]
    options.drop_tables += ["vhea", "vmtx", "VORG", "BASE", "GSUB", "GPOS", "GDEF", "DSIG"]
    font = subset.load_font(source, options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=characters)
    subsetter.subset(font)
    for record in font["name"].names:
        if record.nameID in (FAMILY, FULL_NAME, POSTSCRIPT):
            record.string = name.replace(" ", "") if record.nameID == POSTSCRIPT else name
    if "CFF " in font:
        top = font["CFF "].cff
        top.fontNames[0] = name.replace(" ", "")
    subset.save_font(font, str(OUT / file), options)
    print(f"{file}: {len(font.getBestCmap())} characters, {(OUT / file).stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    make(DEJAVU, WESTERN, "Contact Sheet Western", "western.ttf")
    make(NOTO_CJK, EASTERN, "Contact Sheet Eastern", "eastern.otf")
