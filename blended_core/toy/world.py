"""The embedded world: synthetic scenes with known labels.

A scene has a named background and zero, one or two named objects. A seed determines it, and it can be rendered at any size. The
embedded networks were trained on scenes of 64×64. Objects are sprites from Noto Color Emoji (SIL Open Font License 1.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import BlendedError
from .models import SIDE

MAX_CENTER_OFFSET = 0.5 / SIDE  # largest offset of a centered object from the middle of the scene
SPRITE_SIDE = 96
SHEET_COLUMNS = 4
SPRITES_PATH = Path(__file__).with_name("data") / "sprites.png"

UInt8Image = NDArray[np.uint8]
FloatImage = NDArray[np.float32]


@dataclass(frozen=True)
class ObjectClass:
    """An object: its emoji, its synonyms and its color, as captions name them."""

    glyph: str
    synonyms: tuple[str, ...]
    color: str


OBJECTS: dict[str, ObjectClass] = {
    "apple": ObjectClass("🍎", ("fruit",), "red"),
    "balloon": ObjectClass("🎈", ("party balloon",), "red"),
    "butterfly": ObjectClass("🦋", ("moth",), "orange"),
    "cactus": ObjectClass("🌵", ("saguaro",), "green"),
    "car": ObjectClass("🚙", ("jeep", "automobile"), "blue"),
    "castle": ObjectClass("🏰", ("fortress", "palace"), "grey"),  # the spelling in the training captions
    "cat": ObjectClass("🐱", ("kitten", "kitty"), "yellow"),
    "dog": ObjectClass("🐶", ("puppy", "hound"), "brown"),
    "fish": ObjectClass("🐠", ("tropical fish",), "yellow"),
    "frog": ObjectClass("🐸", ("toad",), "green"),
    "mushroom": ObjectClass("🍄", ("toadstool",), "red"),
    "pumpkin": ObjectClass("🎃", ("jack-o-lantern",), "orange"),
    "rocket": ObjectClass("🚀", ("spaceship",), "white"),
    "rose": ObjectClass("🌹", ("red flower",), "red"),
    "sunflower": ObjectClass("🌻", ("yellow flower",), "yellow"),
    "tree": ObjectClass("🌳", ("oak", "oak tree"), "green"),
}

# Words that a caption may use for each background. The first one is its name.
BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "meadow": ("meadow", "grass", "field", "green field"),
    "desert": ("desert", "sand", "dunes"),
    "night": ("night", "night sky", "dark", "stars"),
    "lake": ("lake", "water", "sea"),
    "snow": ("snow", "winter", "ice"),
    "sunset": ("sunset", "evening", "dusk"),
}

# Colors of the sky at the top and at the horizon, and of the ground at the horizon and at the bottom.
_PALETTE: dict[str, tuple[tuple[int, int, int], ...]] = {
    "meadow": ((96, 168, 236), (196, 226, 248), (128, 190, 84), (58, 138, 52)),
    "desert": ((120, 188, 232), (246, 226, 186), (238, 196, 122), (204, 146, 76)),
    "night": ((10, 14, 46), (34, 42, 92), (24, 34, 52), (12, 18, 30)),
    "lake": ((150, 200, 240), (220, 236, 246), (92, 158, 206), (28, 92, 156)),
    "snow": ((176, 196, 216), (222, 230, 238), (240, 244, 250), (208, 220, 236)),
    "sunset": ((92, 64, 132), (250, 160, 96), (124, 72, 84), (60, 36, 58)),
}


@dataclass(frozen=True)
class Placed:
    """An object in a scene. The center is a fraction of each axis, the size a fraction of the shorter side."""

    name: str
    x: float
    y: float
    size: float
    mirrored: bool = False

    def square(self, width: int, height: int) -> tuple[int, int, int]:
        """(left, top, side) in pixels of the square that the object covers in an image of this size. It may exceed the image."""
        side = max(1, round(self.size * min(width, height)))
        return round(self.x * width - side / 2), round(self.y * height - side / 2), side


@dataclass(frozen=True)
class Scene:
    """The content of an image. ``seed`` determines the details of the background."""

    background: str
    objects: tuple[Placed, ...] = ()
    seed: int = 0
    horizon: float = 0.5

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise BlendedError(f"unknown background {self.background!r}; known are {', '.join(BACKGROUNDS)}.")
        for placed in self.objects:
            if placed.name not in OBJECTS:
                raise BlendedError(f"unknown object {placed.name!r}; known are {', '.join(OBJECTS)}.")


@lru_cache(maxsize=1)
def _sprite_sheet() -> Image.Image:
    return Image.open(SPRITES_PATH, formats=("PNG",)).convert("RGBA")


@lru_cache(maxsize=512)
def sprite(name: str, side: int, mirrored: bool = False) -> FloatImage:
    """An object as [side, side, 4] float32 in 0..1, color premultiplied by alpha."""
    i = list(OBJECTS).index(name)
    x, y = i % SHEET_COLUMNS * SPRITE_SIDE, i // SHEET_COLUMNS * SPRITE_SIDE
    cell = np.asarray(_sprite_sheet().crop((x, y, x + SPRITE_SIDE, y + SPRITE_SIDE)), np.float32) / 255
    cell[..., :3] *= cell[..., 3:]
    # Bilinear resampling antialiases when it shrinks. Unlike bicubic it does not ring at the outline when it enlarges.
    channels = [Image.fromarray(np.ascontiguousarray(cell[..., c])).resize((side, side), Image.Resampling.BILINEAR) for c in range(4)]
    out = np.stack([np.asarray(c) for c in channels], -1).clip(0, 1)
    return np.ascontiguousarray(out[:, ::-1] if mirrored else out)


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cells: tuple[int, int]) -> FloatImage:
    """Bicubic value noise with ``cells`` (rows, columns), from uniform values in −1..1."""
    knots = rng.uniform(-1, 1, (cells[0] + 1, cells[1] + 1)).astype(np.float32)
    field = Image.fromarray(knots).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(field)


def draw_background(scene: Scene, width: int = SIDE, height: int = SIDE) -> FloatImage:
    """The background without objects, [height, width, 3] float32 in 0..1."""
    rng = np.random.default_rng(scene.seed)
    top, far, near, bottom = (np.array(c, np.float32) / 255 for c in _PALETTE[scene.background])
    v = ((np.arange(height, dtype=np.float32) + 0.5) / height)[:, None]
    u = ((np.arange(width, dtype=np.float32) + 0.5) / width)[None, :]
    hills = 0.035 * np.sin(2 * np.pi * (u * rng.uniform(0.6, 1.6) + rng.uniform())).astype(np.float32)
    if scene.background == "lake":
        hills = hills * 0
    line = scene.horizon + hills
    sky = np.clip(v / np.maximum(line, 0.05), 0, 1)[..., None]
    ground = np.clip((v - line) / np.maximum(1 - line, 0.05), 0, 1)[..., None]
    above = top + (far - top) * sky
    below = near + (bottom - near) * ground
    aspect = max(1, round(8 * width / height))
    if scene.background == "lake":
        ripples = np.sin(2 * np.pi * (v * 14 + 0.1 * _smooth_noise(rng, height, width, (3, 4)) + rng.uniform()))
        below = below + (0.035 * ripples)[..., None]
    else:
        below = below + (0.05 * _smooth_noise(rng, height, width, (8, aspect)))[..., None]
    clouds = np.clip(_smooth_noise(rng, height, width, (5, max(1, aspect // 3))), 0, 1)
    if scene.background in ("meadow", "lake", "snow"):
        above = above + (0.25 * clouds)[..., None] * (1 - above)
    edge = np.clip((v - line) * height + 0.5, 0, 1)[..., None]
    picture = above * (1 - edge) + below * edge
    if scene.background == "night":
        stars = rng.uniform(size=(round(16 * width / height), 3))
        for sx, sy, brightness in stars:
            py, px = int(sy * scene.horizon * height), int(sx * width)
            r = max(1, round(height / SIDE))
            picture[py : py + r, px : px + r] += 0.3 + 0.5 * brightness
    shade = 1 + 0.06 * rng.uniform(-1, 1)
    shaded: FloatImage = np.clip(picture * shade, 0, 1).astype(np.float32)
    return shaded


def render(scene: Scene, width: int = SIDE, height: int = SIDE) -> UInt8Image:
    """The scene as an 8-bit RGB image [height, width, 3]."""
    picture = draw_background(scene, width, height)
    for placed in scene.objects:
        left, top, side = placed.square(width, height)
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, width), min(top + side, height)
        if x0 >= x1 or y0 >= y1:
            continue
        s = sprite(placed.name, side, placed.mirrored)[y0 - top : y1 - top, x0 - left : x1 - left]
        view = picture[y0:y1, x0:x1]
        view *= 1 - s[..., 3:]
        view += s[..., :3]
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)


def random_scene(
    rng: np.random.Generator,
    *,
    objects: int | None = None,
    names: Sequence[str] | None = None,
    size: tuple[float, float] = (30 / SIDE, 46 / SIDE),
    centered: float = 0.0,
) -> Scene:
    """A random scene. By default 85 % of the scenes have one object, 10 % have none and 5 % have two smaller ones.

    Args:
        rng: random generator.
        objects: number of objects, 0 to 2; None draws it.
        names: objects to choose from (default: all).
        size: range of the side of a single object, as a fraction of the side of the scene.
        centered: probability that a single object is near the middle, as in a region cut out around a mask.
    """
    if objects is None:
        objects = int(rng.choice(3, p=(0.1, 0.85, 0.05)))
    pool = list(names or OBJECTS)
    background = list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
    placed = []
    for i in range(objects):
        side = float(rng.uniform(*size) if objects == 1 else rng.uniform(26 / SIDE, 30 / SIDE))
        x_range = y_range = (side / 2, 1 - side / 2)
        if objects > 1:
            x_range = (i / 2 + side / 2, (i + 1) / 2 - side / 2)
        elif centered and rng.uniform() < centered:
            x_range = y_range = (0.5 - MAX_CENTER_OFFSET, 0.5 + MAX_CENTER_OFFSET)
        placed.append(
            Placed(
                name=pool[int(rng.integers(len(pool)))],
                x=float(rng.uniform(min(x_range), max(x_range))),
                y=float(rng.uniform(*y_range)),
                size=side,
            )
        )
    return Scene(background, tuple(placed), int(rng.integers(2**31)), float(rng.uniform(0.2, 0.8)))


def demo_scene(
    background: str = "meadow", seed: int = 0, width: int = SIDE, height: int = SIDE, name: str | None = None
) -> tuple[UInt8Image, UInt8Image]:
    """A scene and a mask for an edit, both 8-bit RGB [height, width, 3].

    The mask is an ellipse in the middle, about two thirds of the shorter side wide. Without ``name`` the scene is empty; with it, the
    object is inside the mask.
    """
    rng = np.random.default_rng(seed)
    drawn = int(rng.integers(2**31)), float(rng.uniform(0.4, 0.6))
    short = min(width, height)
    x, y = width * float(rng.uniform(0.48, 0.52)), height * float(rng.uniform(0.48, 0.52))
    placed = () if name is None else (Placed(name, x / width, y / height, 38 / SIDE),)
    yy, xx = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    inside = ((xx - x) / (0.34 * short)) ** 2 + ((yy - y) / (0.36 * short)) ** 2 <= 1
    mask = np.where(inside, np.uint8(255), np.uint8(0))
    return render(Scene(background, placed, *drawn), width, height), np.repeat(mask[..., None], 3, 2)
