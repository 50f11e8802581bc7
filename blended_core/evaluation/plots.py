"""Contact sheets and plots of an evaluation."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..io.atomic import write_bytes
from ..io.images import UInt8
from ..toy.world import demo_scene
from .metrics import Pair, load_candidates

PAGE, TEXT, MUTED, GRID = (250, 249, 246), (34, 34, 40), (128, 128, 136), (224, 222, 216)
ACCEPTED, REJECTED = (58, 148, 84), (208, 206, 200)
BATCH_COLOR, BEST_COLOR = (122, 162, 214), (214, 84, 44)
TILE, GAP, LABEL = 96, 8, 150


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _write(path: Path, image: Image.Image) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    write_bytes(path, buffer.getvalue())


def _write_contact_sheet(
    path: Path, title: str, lines: Sequence[tuple[str, str, Sequence[tuple[UInt8, bool | None]]]], column_titles: Sequence[str]
) -> None:
    """Writes rows of images, each with two lines of text before it. Accepted images have a green frame, rejected ones a gray frame."""
    columns = max(len(tiles) for _, _, tiles in lines)
    top = 74
    sheet = Image.new("RGB", (LABEL + columns * (TILE + GAP) + GAP, top + len(lines) * (TILE + GAP) + GAP), PAGE)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP * 2, 14), title, TEXT, _font(22))
    for i, head in enumerate(column_titles):
        draw.text((LABEL + i * (TILE + GAP), 52), head, MUTED, _font(13))
    for row, (first, second, tiles) in enumerate(lines):
        y = top + row * (TILE + GAP)
        draw.text((GAP * 2, y + TILE // 2 - 18), first, TEXT, _font(15))
        draw.text((GAP * 2, y + TILE // 2 + 3), second, MUTED, _font(12))
        for i, (pixels, accepted) in enumerate(tiles):
            x = LABEL + i * (TILE + GAP)
            if accepted is not None:
                draw.rectangle((x - 3, y - 3, x + TILE + 2, y + TILE + 2), fill=ACCEPTED if accepted else REJECTED)
            sheet.paste(Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.LANCZOS), (x, y))
    _write(path, sheet)


def row_sheet(path: Path, out: Path, row: str, cases: Sequence[Pair]) -> None:
    """Writes a contact sheet with one line per pair: the scene and all candidates, best first."""
    lines: list[tuple[str, str, list[tuple[UInt8, bool | None]]]] = []
    for case in cases:
        tiles, accepted = load_candidates(out, row, case)
        source: list[tuple[UInt8, bool | None]] = [(demo_scene(case.background, case.seed)[0], None)]
        lines.append((case.prompt, case.background, source + list(zip(tiles, accepted, strict=True))))
    _write_contact_sheet(
        path,
        f"{row}: the judge accepts candidates with a green frame",
        lines,
        ["scene", *(f"rank {i + 1}" for i in range(len(lines[0][2]) - 1))],
    )


def comparison(path: Path, out: Path, rows: Sequence[str], cases: Sequence[Pair]) -> None:
    """Writes a contact sheet with one line per row of the table: the first candidate of every pair."""
    scenes: list[tuple[UInt8, bool | None]] = [(demo_scene(c.background, c.seed)[0], None) for c in cases]
    lines: list[tuple[str, str, list[tuple[UInt8, bool | None]]]] = [("scene", "", scenes)]
    for row in rows:
        firsts = [load_candidates(out, row, case) for case in cases]
        lines.append((row, "", [(tiles[0], accepted[0]) for tiles, accepted in firsts]))
    _write_contact_sheet(path, "First candidate of every row", lines, [case.prompt for case in cases])


def plot(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Plots both precisions as bars for every row, and against the seconds per candidate."""
    scale = 2  # supersampling, because Pillow does not antialias
    left, top, bar_height = 150, 70, 22
    width, height = 900, 364 + len(rows) * (bar_height + 10)
    image = Image.new("RGB", (width * scale, height * scale), PAGE)
    draw = ImageDraw.Draw(image)

    def text(x: float, y: float, label: str, color: tuple[int, int, int] = TEXT, size: int = 13, anchor: str = "la") -> None:
        draw.text((x * scale, y * scale), label, color, _font(size * scale), anchor=anchor)

    def box(x: float, y: float, x1: float, y1: float, color: tuple[int, int, int]) -> None:
        draw.rectangle((x * scale, y * scale, x1 * scale, y1 * scale), fill=color)

    text(20, 16, "Judged precision", size=20)
    for begin, color, label in ((left, BATCH_COLOR, "of all candidates"), (left + 150, BEST_COLOR, "of the first candidate")):
        box(begin, 49, begin + 11, 60, color)
        text(begin + 17, 47, label, MUTED)
    span = width - left - 60
    bottom = top + len(rows) * (bar_height + 10)
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = float(left + share * span)
        draw.line((x * scale, top * scale, x * scale, bottom * scale), fill=GRID, width=scale)
        text(x, bottom + 4, f"{share:.0%}", MUTED, 12, "ma")
    for i, row in enumerate(rows):
        y = float(top + i * (bar_height + 10) + 4)
        text(left - 10, y + bar_height / 2, f"{row['name']}  {i + 1}", anchor="rm")
        for j, (key, color) in enumerate((("batch_precision", BATCH_COLOR), ("best_precision", BEST_COLOR))):
            value = row[key] or 0.0
            box(left, y + j * bar_height / 2, left + max(1.0, value * span), y + (j + 1) * bar_height / 2 - 1, color)
            text(left + value * span + 6, y + j * bar_height / 2 - 2, f"{value:.0%}", MUTED, 10)
    above, below = bottom + 70, height - 50
    text(20, bottom + 34, "Judged precision by seconds per candidate", size=20)
    timed = [(i, row) for i, row in enumerate(rows) if row["seconds"] is not None]
    time_axis = max((row["seconds"] for _, row in timed), default=1.0) * 1.1
    for share in (0, 0.5, 1):
        y = below - share * (below - above)
        draw.line((left * scale, y * scale, (left + span) * scale, y * scale), fill=GRID, width=scale)
        text(left - 10, y, f"{share:.0%}", MUTED, 12, "rm")
    for share in (0, 0.25, 0.5, 0.75, 1):
        text(left + share * span, below + 6, f"{share * time_axis:.1f} s", MUTED, 12, "ma")
    for i, row in timed:
        x = left + row["seconds"] / time_axis * span
        for key, color in (("batch_precision", BATCH_COLOR), ("best_precision", BEST_COLOR)):
            y = below - (row[key] or 0.0) * (below - above)
            draw.ellipse(((x - 4) * scale, (y - 4) * scale, (x + 4) * scale, (y + 4) * scale), fill=color)
            text(x + 6, y - 12, str(i + 1), color, 10)
    _write(path, image.resize((width, height), Image.Resampling.LANCZOS))
