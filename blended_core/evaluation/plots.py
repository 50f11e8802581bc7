"""Pictures of an evaluation: sheets of what every row painted, and plots of its table."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..io.atomic import write_bytes
from ..io.images import UInt8
from ..toy.world import demo_scene
from .metrics import Pair, strip_of

PAPER, INK, FAINT, GRID = (250, 249, 246), (34, 34, 40), (128, 128, 136), (224, 222, 216)
YES, NO = (58, 148, 84), (208, 206, 200)
BATCH, BEST = (122, 162, 214), (214, 84, 44)
TILE, GAP, LABEL = 96, 8, 150


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _write(path: Path, image: Image.Image) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    write_bytes(path, buffer.getvalue())


def _tiles(path: Path, title: str, lines: Sequence[tuple[str, str, Sequence[tuple[UInt8, bool | None]]]], heads: Sequence[str]) -> None:
    """Rows of pictures with two lines of text before each; a picture's frame is green if the judge accepted it."""
    columns = max(len(tiles) for _, _, tiles in lines)
    top = 74
    sheet = Image.new("RGB", (LABEL + columns * (TILE + GAP) + GAP, top + len(lines) * (TILE + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP * 2, 14), title, INK, _font(22))
    for i, head in enumerate(heads):
        draw.text((LABEL + i * (TILE + GAP), 52), head, FAINT, _font(13))
    for row, (first, second, tiles) in enumerate(lines):
        y = top + row * (TILE + GAP)
        draw.text((GAP * 2, y + TILE // 2 - 18), first, INK, _font(15))
        draw.text((GAP * 2, y + TILE // 2 + 3), second, FAINT, _font(12))
        for i, (pixels, accepted) in enumerate(tiles):
            x = LABEL + i * (TILE + GAP)
            if accepted is not None:
                draw.rectangle((x - 3, y - 3, x + TILE + 2, y + TILE + 2), fill=YES if accepted else NO)
            sheet.paste(Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.LANCZOS), (x, y))
    _write(path, sheet)


def row_sheet(path: Path, out: Path, row: str, cases: Sequence[Pair]) -> None:
    """Pairs of one row below each other: the scene, then all candidates, best first."""
    lines: list[tuple[str, str, list[tuple[UInt8, bool | None]]]] = []
    for case in cases:
        tiles, accepted = strip_of(out, row, case)
        source: list[tuple[UInt8, bool | None]] = [(demo_scene(case.background, case.seed)[0], None)]
        lines.append((case.prompt, case.background, source + list(zip(tiles, accepted, strict=True))))
    _tiles(path, f"{row}: green is what the judge accepts", lines, ["scene", *(f"rank {i + 1}" for i in range(len(lines[0][2]) - 1))])


def comparison(path: Path, out: Path, rows: Sequence[str], cases: Sequence[Pair]) -> None:
    """The same pairs by every row, the first candidate of each."""
    scenes: list[tuple[UInt8, bool | None]] = [(demo_scene(c.background, c.seed)[0], None) for c in cases]
    lines: list[tuple[str, str, list[tuple[UInt8, bool | None]]]] = [("scene", "", scenes)]
    for row in rows:
        firsts = [strip_of(out, row, case) for case in cases]
        lines.append((row, "", [(tiles[0], accepted[0]) for tiles, accepted in firsts]))
    _tiles(path, "Every row's first candidate", lines, [case.prompt for case in cases])


def plot(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Bars of both precisions, one group a row; and both against the time that a candidate takes."""
    scale = 2  # drawn large and brought down, since Pillow's lines are not smooth
    left, top, high = 150, 70, 22
    width, height = 900, 364 + len(rows) * (high + 10)
    image = Image.new("RGB", (width * scale, height * scale), PAPER)
    draw = ImageDraw.Draw(image)

    def text(x: float, y: float, words: str, colour: tuple[int, int, int] = INK, size: int = 13, anchor: str = "la") -> None:
        draw.text((x * scale, y * scale), words, colour, _font(size * scale), anchor=anchor)

    def box(x: float, y: float, x1: float, y1: float, colour: tuple[int, int, int]) -> None:
        draw.rectangle((x * scale, y * scale, x1 * scale, y1 * scale), fill=colour)

    text(20, 16, "Judged precision", size=20)
    for begin, colour, words in ((left, BATCH, "of all candidates"), (left + 150, BEST, "of the first ranked")):
        box(begin, 49, begin + 11, 60, colour)
        text(begin + 17, 47, words, FAINT)
    span = width - left - 60
    bottom = top + len(rows) * (high + 10)
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = float(left + share * span)
        draw.line((x * scale, top * scale, x * scale, bottom * scale), fill=GRID, width=scale)
        text(x, bottom + 4, f"{share:.0%}", FAINT, 12, "ma")
    for i, row in enumerate(rows):
        y = float(top + i * (high + 10) + 4)
        text(left - 10, y + high / 2, f"{row['name']}  {i + 1}", anchor="rm")
        for j, (key, colour) in enumerate((("batch_precision", BATCH), ("best_precision", BEST))):
            value = row[key] or 0.0
            box(left, y + j * high / 2, left + max(1.0, value * span), y + (j + 1) * high / 2 - 1, colour)
            text(left + value * span + 6, y + j * high / 2 - 2, f"{value:.0%}", FAINT, 10)
    above, below = bottom + 70, height - 50
    text(20, bottom + 34, "… against seconds a candidate", size=20)
    most = max(row["seconds"] for row in rows) * 1.1
    for share in (0, 0.5, 1):
        y = below - share * (below - above)
        draw.line((left * scale, y * scale, (left + span) * scale, y * scale), fill=GRID, width=scale)
        text(left - 10, y, f"{share:.0%}", FAINT, 12, "rm")
    for share in (0, 0.25, 0.5, 0.75, 1):
        text(left + share * span, below + 6, f"{share * most:.1f} s", FAINT, 12, "ma")
    for i, row in enumerate(rows):
        x = left + row["seconds"] / most * span
        for key, colour in (("batch_precision", BATCH), ("best_precision", BEST)):
            y = below - (row[key] or 0.0) * (below - above)
            draw.ellipse(((x - 4) * scale, (y - 4) * scale, (x + 4) * scale, (y + 4) * scale), fill=colour)
            text(x + 6, y - 12, str(i + 1), colour, 10)
    _write(path, image.resize((width, height), Image.Resampling.LANCZOS))
