"""The contact sheet of a run, and the animation of a candidate."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .atomic import write_bytes
from .images import UInt8, to_uint8

TILE = 256
GAP = 20
CAPTION_HEIGHT = 46
HEADING_HEIGHT = 84
PAPER, INK, FAINT, ACCENT, FRAME = (250, 249, 246), (34, 34, 40), (128, 128, 136), (214, 84, 44), (208, 206, 200)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _resized(pixels: UInt8, width: int, height: int) -> Image.Image:
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)


def _tile_size(width: int, height: int) -> tuple[int, int]:
    scale = TILE / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def thumbnail(pixels: UInt8) -> UInt8:
    """A picture [H, W, 3] as the contact sheet needs it: unchanged, or scaled so that its longer side is TILE pixels."""
    height, width = pixels.shape[:2]
    return pixels if max(height, width) <= TILE else np.array(_resized(pixels, *_tile_size(width, height)))


def show_mask(rgb: UInt8, mask: Tensor) -> UInt8:
    """The picture in pale gray outside the mask, with the edge of the mask drawn."""
    weight = mask[0, 0].clamp(0, 1).numpy()[..., None]
    gray = rgb.mean(-1, keepdims=True) * 0.45 + 255 * 0.55 * 0.9
    out = rgb * weight + gray * (1 - weight)
    inside = (mask >= 0.5).float() if float(mask.max()) >= 0.5 else (mask > 0).float()
    reach = max(1, round(min(rgb.shape[:2]) / 160))
    edge = F.max_pool2d(inside, 2 * reach + 1, 1, reach) - inside
    out = np.where(edge[0, 0].numpy()[..., None] > 0, np.array(ACCENT), out)
    shown: UInt8 = out.round().clip(0, 255).astype(np.uint8)
    return shown


def contact_sheet(
    path: Path,
    source: UInt8,
    mask: Tensor,
    results: Sequence[tuple[UInt8, str, str]],
    title: str,
    subtitle: str,
    columns: int = 4,
    highlight: bool = True,
) -> None:
    """Writes a PNG with the source, the mask and the results.

    Args:
        path: the file.
        source: [H, W, 3].
        mask: [1, 1, H, W].
        results: pictures of the same shape, or their :func:`thumbnail`, each with two lines of text.
        title, subtitle: the heading.
        columns: number of tiles in a row.
        highlight: frame the first result, the best one.
    """
    height, width = source.shape[:2]
    tile_w, tile_h = _tile_size(width, height)
    tiles = [
        (source, "source", f"{width} x {height}"),
        (show_mask(source, mask), "mask", f"{float((mask >= 0.5).float().mean()):.0%} of the picture"),
        *results,
    ]
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet_w = max(GAP + columns * (tile_w + GAP), 3 * TILE)
    sheet = Image.new("RGB", (sheet_w, HEADING_HEIGHT + rows * (tile_h + CAPTION_HEIGHT + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, (GAP, 18), title, _font(26), INK, sheet_w - 2 * GAP)
    _write(draw, (GAP, 53), subtitle, _font(14), FAINT, sheet_w - 2 * GAP)
    for i, (pixels, first, second) in enumerate(tiles):
        x, y = GAP + i % columns * (tile_w + GAP), HEADING_HEIGHT + i // columns * (tile_h + CAPTION_HEIGHT + GAP)
        sheet.paste(_resized(pixels, tile_w, tile_h), (x, y))
        best = highlight and i == 2
        draw.rectangle((x - 1, y - 1, x + tile_w, y + tile_h), outline=ACCENT if best else FRAME, width=2 if best else 1)
        _write(draw, (x, y + tile_h + 6), first, _font(15), INK, tile_w + GAP // 2)
        _write(draw, (x, y + tile_h + 25), second, _font(12), FAINT, tile_w + GAP // 2)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    write_bytes(path, buffer.getvalue())


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, font: Font, color: tuple[int, int, int], width: int) -> None:
    """Draws a text in one line, shortened to ``width`` pixels."""
    text = " ".join(text.split())  # Pillow cannot measure text of several lines
    if draw.textlength(text, font) > width:
        while text and draw.textlength(text + "…", font) > width:
            text = text[:-1]
        text += "…"
    draw.text(place, text, color, font)


def animation(path: Path, frames: Sequence[Tensor], milliseconds: int = 60, hold: int = 1500) -> None:
    """Writes frames [1, 3, S, S] in 0..1 as an endless WebP animation of at least 256 pixels; the last frame is shown for ``hold`` milliseconds."""
    images = []
    for frame in frames:
        image = Image.fromarray(to_uint8(frame))
        if image.width < TILE:
            factor = -(-TILE // image.width)
            image = image.resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS)
        images.append(image)
    buffer = io.BytesIO()
    durations = [milliseconds] * (len(images) - 1) + [hold]
    images[0].save(buffer, "WEBP", save_all=True, append_images=images[1:], duration=durations, loop=0, quality=90)
    write_bytes(path, buffer.getvalue())
