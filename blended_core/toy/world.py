"""The embedded world: little scenes whose truth is known.

A scene is a named background with none, one or two named objects. Everything is drawn from a seed, at any size; the
embedded networks were trained on it at 64×64. Objects are sprites of Noto Color Emoji (SIL Open Font License 1.1).
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

SIDE = 64  # pixels of a training scene
CENTRE = 0.5 / SIDE  # how far from the middle a centred object may stand
GUIDANCE_SCALE = 3000.0  # suits the embedded models; those of photographs want the presets' own
SPRITE_SIDE = 96
SHEET_COLUMNS = 4
SPRITES_PATH = Path(__file__).with_name("data") / "sprites.png"

UInt8Image = NDArray[np.uint8]
FloatImage = NDArray[np.float32]


@dataclass(frozen=True)
class Thing:
    """An object: its emoji, other words for it and its colour as a person would say it."""

    glyph: str
    synonyms: tuple[str, ...]
    colour: str


OBJECTS: dict[str, Thing] = {
    "apple": Thing("🍎", ("fruit",), "red"),
    "balloon": Thing("🎈", ("party balloon",), "red"),
    "butterfly": Thing("🦋", ("moth",), "orange"),
    "cactus": Thing("🌵", ("saguaro",), "green"),
    "car": Thing("🚙", ("jeep", "automobile"), "blue"),
    "castle": Thing("🏰", ("fortress", "palace"), "grey"),
    "cat": Thing("🐱", ("kitten", "kitty"), "yellow"),
    "dog": Thing("🐶", ("puppy", "hound"), "brown"),
    "fish": Thing("🐠", ("tropical fish",), "yellow"),
    "frog": Thing("🐸", ("toad",), "green"),
    "mushroom": Thing("🍄", ("toadstool",), "red"),
    "pumpkin": Thing("🎃", ("jack-o-lantern",), "orange"),
    "rocket": Thing("🚀", ("spaceship",), "white"),
    "rose": Thing("🌹", ("red flower",), "red"),
    "sunflower": Thing("🌻", ("yellow flower",), "yellow"),
    "tree": Thing("🌳", ("oak", "oak tree"), "green"),
}

# Phrases that a caption may use for each background, its name first.
BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "meadow": ("meadow", "grass", "field", "green field"),
    "desert": ("desert", "sand", "dunes"),
    "night": ("night", "night sky", "dark", "stars"),
    "lake": ("lake", "water", "sea"),
    "snow": ("snow", "winter", "ice"),
    "sunset": ("sunset", "evening", "dusk"),
}

# Sky at the top, sky at the horizon, ground at the horizon, ground at the bottom.
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
    """An object in a scene; centre and size as fractions of the scene's shorter side and of each axis."""

    name: str
    x: float
    y: float
    size: float
    mirrored: bool = False

    def square(self, width: int, height: int) -> tuple[int, int, int]:
        """(left, top, side) in pixels where it is drawn in a picture of that size; it may reach beyond."""
        side = max(1, round(self.size * min(width, height)))
        return round(self.x * width - side / 2), round(self.y * height - side / 2), side


@dataclass(frozen=True)
class Scene:
    """What a picture of the world shows. ``seed`` draws the background's details."""

    background: str
    objects: tuple[Placed, ...] = ()
    seed: int = 0
    horizon: float = 0.5

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise BlendedError(f"the world has no background {self.background!r}; it has {', '.join(BACKGROUNDS)}.")
        for placed in self.objects:
            if placed.name not in OBJECTS:
                raise BlendedError(f"the world has no object {placed.name!r}; it has {', '.join(OBJECTS)}.")


@lru_cache(maxsize=1)
def _sheet() -> Image.Image:
    return Image.open(SPRITES_PATH).convert("RGBA")


@lru_cache(maxsize=512)
def sprite(name: str, side: int, mirrored: bool = False) -> FloatImage:
    """An object as [side, side, 4] float32 in 0..1, colour premultiplied by alpha."""
    i = list(OBJECTS).index(name)
    x, y = i % SHEET_COLUMNS * SPRITE_SIDE, i // SHEET_COLUMNS * SPRITE_SIDE
    cell = np.asarray(_sheet().crop((x, y, x + SPRITE_SIDE, y + SPRITE_SIDE)), np.float32) / 255
    cell[..., :3] *= cell[..., 3:]
    # Bilinear widens its window when it shrinks, and unlike a cubic never rings at the outline when it enlarges.
    channels = [Image.fromarray(np.ascontiguousarray(cell[..., c])).resize((side, side), Image.Resampling.BILINEAR) for c in range(4)]
    out = np.stack([np.asarray(c) for c in channels], -1).clip(0, 1)
    return np.ascontiguousarray(out[:, ::-1] if mirrored else out)


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cells: tuple[int, int]) -> FloatImage:
    """Bilinear value noise in −1..1 with ``cells`` (rows, columns) knots."""
    knots = rng.uniform(-1, 1, (cells[0] + 1, cells[1] + 1)).astype(np.float32)
    field = Image.fromarray(knots).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(field)


def draw_background(scene: Scene, width: int = SIDE, height: int = SIDE) -> FloatImage:
    """The background alone, [height, width, 3] float32 in 0..1."""
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
    """The scene as an 8-bit RGB picture [height, width, 3]."""
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
    centred: float = 0.0,
) -> Scene:
    """A scene from the generator: one object mostly, none in a tenth, two smaller ones in a twentieth of all cases.

    Args:
        rng: source of every choice.
        objects: 0, 1 or 2 to fix their number.
        names: objects to choose from (default: all).
        size: range of an object's side as a fraction of the scene's, for scenes with one object.
        centred: probability that a single object stands near the middle, as it does in a region cut out around a mask.
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
        elif centred and rng.uniform() < centred:
            x_range = y_range = (0.5 - CENTRE, 0.5 + CENTRE)
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
    """A scene and a mask to draw an object into, both 8-bit RGB [height, width, 3].

    The mask is an ellipse of about two thirds of the shorter side, in the middle. The scene is empty, or shows the named
    object where the mask is.
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
