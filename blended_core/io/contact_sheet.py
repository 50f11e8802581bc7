"""The contact sheet of a run, and the animation of a candidate."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from .atomic import write_bytes
from .images import UInt8, to_uint8
from .text import draw_line

TILE = 256
GAP = 20
CAPTION_HEIGHT = 46
HEADING_HEIGHT = 84
EDGE = 2
"""Pixels that the edge of the mask is drawn with."""
PAPER, INK, FAINT, ACCENT, FRAME = (250, 249, 246), (34, 34, 40), (128, 128, 136), (214, 84, 44), (208, 206, 200)


def _resized(pixels: UInt8, width: int, height: int) -> Image.Image:
    # The gap: a large picture is first averaged to four times the size, in a tenth of the time.
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, reducing_gap=4.0)


def _tile_size(width: int, height: int) -> tuple[int, int]:
    scale = TILE / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def thumbnail(pixels: UInt8) -> UInt8:
    """A picture [H, W, 3] as the contact sheet needs it: unchanged, or scaled so that its longer side is TILE pixels."""
    height, width = pixels.shape[:2]
    return pixels if max(height, width) <= TILE else np.array(_resized(pixels, *_tile_size(width, height)))


def show_mask(rgb: UInt8, weight: UInt8) -> UInt8:
    """The picture in pale gray outside the mask, with the edge of the mask drawn.

    Args:
        rgb: [H, W, 3], as small as it is shown. weight: the mask [H, W], 255 = edit.
    """
    share = weight[..., None] / np.float32(255)
    gray = rgb.mean(-1, keepdims=True) * 0.45 + 255 * 0.55 * 0.9
    out = rgb * share + gray * (1 - share)
    inside = weight >= 128 if int(weight.max(initial=0)) >= 128 else weight > 0
    grown = Image.fromarray(inside).convert("L").filter(ImageFilter.MaxFilter(2 * EDGE + 1))
    out = np.where(((np.asarray(grown) > 0) & ~inside)[..., None], np.array(ACCENT), out)
    shown: UInt8 = out.round().clip(0, 255).astype(np.uint8)
    return shown


def _small_mask(mask: Tensor, width: int, height: int) -> UInt8:
    """A mask [1, 1, H, W] in 0..1 as [height, width]. What is thinner than a pixel keeps a part of its value."""
    full = (mask[0, 0].clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return np.array(Image.fromarray(full).resize((width, height), Image.Resampling.BOX))


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
        mask: [1, 1, H, W] in 0..1.
        results: pictures of the same shape, or their :func:`thumbnail`, each with two lines of text.
        title, subtitle: the heading.
        columns: number of tiles in a row.
        highlight: frame the first result, the best one.
    """
    height, width = source.shape[:2]
    tile_w, tile_h = _tile_size(width, height)
    # Drawn at the size of a tile: a large picture is only scaled down here.
    small = np.array(_resized(source, tile_w, tile_h))
    tiles = [
        (small, "source", f"{width} x {height}"),
        (show_mask(small, _small_mask(mask, tile_w, tile_h)), "mask", f"{float((mask >= 0.5).float().mean()):.0%} of the picture"),
        *results,
    ]
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet_w = max(GAP + columns * (tile_w + GAP), 3 * TILE)
    sheet = Image.new("RGB", (sheet_w, HEADING_HEIGHT + rows * (tile_h + CAPTION_HEIGHT + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw_line(draw, (GAP, 14), title, 24, INK, sheet_w - 2 * GAP)
    draw_line(draw, (GAP, 51), subtitle, 13, FAINT, sheet_w - 2 * GAP)
    for i, (pixels, first, second) in enumerate(tiles):
        x, y = GAP + i % columns * (tile_w + GAP), HEADING_HEIGHT + i // columns * (tile_h + CAPTION_HEIGHT + GAP)
        sheet.paste(_resized(pixels, tile_w, tile_h), (x, y))
        best = highlight and i == 2
        draw.rectangle((x - 1, y - 1, x + tile_w, y + tile_h), outline=ACCENT if best else FRAME, width=2 if best else 1)
        draw_line(draw, (x, y + tile_h + 5), first, 14, INK, tile_w + GAP // 2)
        draw_line(draw, (x, y + tile_h + 24), second, 11, FAINT, tile_w + GAP // 2)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    write_bytes(path, buffer.getvalue())


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
