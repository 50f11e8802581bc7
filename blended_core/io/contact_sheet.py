"""Pictures about pictures: the contact sheet and the animation of x̂0."""

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
CAPTION = 46
PAPER, INK, FAINT, ACCENT, FRAME = (250, 249, 246), (34, 34, 40), (128, 128, 136), (214, 84, 44), (208, 206, 200)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _tile(pixels: UInt8, width: int, height: int) -> Image.Image:
    image = Image.fromarray(pixels)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _tile_size(width: int, height: int) -> tuple[int, int]:
    scale = TILE / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def thumbnail(pixels: UInt8) -> UInt8:
    """What the contact sheet needs of a picture [H, W, 3]: itself, or a copy whose longer side is TILE px."""
    height, width = pixels.shape[:2]
    return pixels if max(height, width) <= TILE else np.array(_tile(pixels, *_tile_size(width, height)))


def show_mask(rgb: UInt8, mask: Tensor) -> UInt8:
    """The picture with everything outside the mask pale and grey, and the mask's edge drawn."""
    weight = mask[0, 0].clamp(0, 1).numpy()[..., None]
    grey = rgb.mean(-1, keepdims=True) * 0.45 + 255 * 0.55 * 0.9
    out = rgb * weight + grey * (1 - weight)
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
    """Source, mask and results on one sheet.

    Args:
        path: where the PNG goes.
        source: [H, W, 3].
        results: pictures of the same shape, or their :func:`thumbnail`; each comes with two lines of text.
        mask: [1, 1, H, W].
        title, subtitle: the sheet's heading.
        columns: tiles a row.
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
    head = 84
    sheet_w = GAP + columns * (tile_w + GAP)
    sheet_w = max(sheet_w, 3 * TILE)
    sheet = Image.new("RGB", (sheet_w, head + rows * (tile_h + CAPTION + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 18), _fitted(draw, title, _font(26), sheet_w - 2 * GAP), INK, _font(26))
    draw.text((GAP, 53), _fitted(draw, subtitle, _font(14), sheet_w - 2 * GAP), FAINT, _font(14))
    for i, (pixels, first, second) in enumerate(tiles):
        x, y = GAP + i % columns * (tile_w + GAP), head + i // columns * (tile_h + CAPTION + GAP)
        sheet.paste(_tile(pixels, tile_w, tile_h), (x, y))
        best = highlight and i == 2
        draw.rectangle((x - 1, y - 1, x + tile_w, y + tile_h), outline=ACCENT if best else FRAME, width=2 if best else 1)
        draw.text((x, y + tile_h + 6), _fitted(draw, first, _font(15), tile_w + GAP // 2), INK, _font(15))
        draw.text((x, y + tile_h + 25), _fitted(draw, second, _font(12), tile_w + GAP // 2), FAINT, _font(12))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    write_bytes(path, buffer.getvalue())


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: int) -> str:
    text = " ".join(text.split())  # one line: Pillow cannot measure two
    if draw.textlength(text, font) <= room:
        return text
    while text and draw.textlength(text + "…", font) > room:
        text = text[:-1]
    return text + "…"


def animation(path: Path, frames: Sequence[Tensor], milliseconds: int = 60, hold: int = 1500) -> None:
    """Frames [1, 3, S, S] in 0..1 as an endless WebP animation, enlarged to at least 256 px; the last one is held."""
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
