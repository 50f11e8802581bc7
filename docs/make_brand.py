"""Draws the icon and the banner of the pack: ``uv run python docs/make_brand.py``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from blended_core.toy.world import Scene, draw_background, sprite

HERE = Path(__file__).parent / "images"
INK = (250, 249, 246)
SUPERSAMPLING = 3  # factor, for antialiasing

Floats = NDArray[np.float32]


def disc(side: int) -> Floats:
    """[side, side, 1]: 1 inside the largest circle."""
    at = np.arange(side, dtype=np.float32) - (side - 1) / 2
    return (np.hypot(at[:, None], at[None, :]) < side / 2).astype(np.float32)[..., None]


def noisy_object(ground: Floats, name: str, level: Floats, rng: np.random.Generator, grain: int) -> Floats:
    """The object on its background [S, S, 3], mixed with noise. ``level`` is the fraction of noise, ``grain`` its cell size in pixels."""
    side = ground.shape[0]
    inner = round(side * 0.74)
    at = (side - inner) // 2
    # Bicubic, because the small sprite is enlarged.
    small = sprite(name, 96)
    large = np.stack([np.asarray(Image.fromarray(small[..., c]).resize((inner, inner), Image.Resampling.BICUBIC)) for c in range(4)], -1)
    picture = ground.copy()
    view = picture[at : at + inner, at : at + inner]
    view[:] = view * (1 - large[..., 3:]) + large[..., :3]
    cells = -(-side // grain)
    noise = np.kron(rng.normal(0.5, 0.28, (cells, cells, 3)), np.ones((grain, grain, 1)))[:side, :side].astype(np.float32)
    return np.clip(picture * (1 - level) + noise * level, 0, 1).astype(np.float32)


def draw_object_in_disc(
    canvas: Floats, name: str, center: tuple[int, int], side: int, level: Floats, seed: int, grain: int, rim: int
) -> None:
    """Draws a noisy object into a disc with a ring around it."""
    top, left = center[1] - side // 2, center[0] - side // 2
    ring = side + 2 * rim
    view = canvas[top - rim : top - rim + ring, left - rim : left - rim + ring]
    view[:] = view * (1 - disc(ring)) + np.array(INK, np.float32) / 255 * disc(ring)
    ground = draw_background(Scene("meadow", seed=seed, horizon=0.62), side, side)
    inside = noisy_object(ground, name, level, np.random.default_rng(seed), grain)
    view = canvas[top : top + side, left : left + side]
    view[:] = view * (1 - disc(side)) + inside * disc(side)


def downsampled(canvas: Floats, size: tuple[int, int]) -> Image.Image:
    """The canvas as an 8-bit image of the final size."""
    return Image.fromarray((canvas * 255 + 0.5).astype(np.uint8)).resize(size, Image.Resampling.LANCZOS)


def icon(path: Path, size: int = 400) -> None:
    """Writes the icon: a disc in a landscape, with noise on the left and an apple on the right."""
    side = size * SUPERSAMPLING
    canvas = draw_background(Scene("lake", seed=5, horizon=0.52), side, side)
    inner = round(side * 0.74)
    across = np.linspace(1.25, -0.75, inner, dtype=np.float32).clip(0, 1)[None, :, None]
    draw_object_in_disc(canvas, "apple", (side // 2, side // 2), inner, across, 11, side // 26, side // 50)
    picture = downsampled(canvas, (size, size)).convert("RGBA")
    corners = Image.new("L", (side, side), 0)
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, side - 1, side - 1), side // 6, fill=255)
    picture.putalpha(corners.resize((size, size), Image.Resampling.LANCZOS))
    picture.save(path, optimize=True)


def banner(path: Path, width: int = 1680) -> None:
    """Writes the banner (21:9): an edit at five noise levels, and the name."""
    height = width * 9 // 21
    canvas = draw_background(Scene("sunset", seed=3, horizon=0.72), width * SUPERSAMPLING, height * SUPERSAMPLING)
    side, count = round(height * 0.36) * SUPERSAMPLING, 5
    for i in range(count):
        x = round(width * SUPERSAMPLING * (i + 0.75) / (count + 0.5))
        level = np.full((1, 1, 1), max(0.0, 0.92 - 0.31 * i) if i < 3 else (0.12 if i == 3 else 0.0), np.float32)
        draw_object_in_disc(canvas, "apple", (x, round(height * 0.62) * SUPERSAMPLING), side, level, 11, side // 30, side // 46)
    picture = downsampled(canvas, (width, height))
    draw = ImageDraw.Draw(picture)
    draw.text((width * 0.075, height * 0.09), "Blended Diffusion", INK, ImageFont.load_default(round(height * 0.155)))
    tagline = "edits a region of a real picture from a sentence, and leaves every other pixel untouched"
    draw.text((width * 0.077, height * 0.28), tagline, INK, ImageFont.load_default(round(height * 0.046)))
    picture.save(path, quality=90)


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    icon(HERE / "icon.png")
    banner(HERE / "banner.jpg")
