"""World 2: objects in several designs before photographs and drawn grounds, whose truth is known.

A scene is a ground with none, one or two named objects. A ground is a crop of a landscape photograph or one of the drawn grounds of
:mod:`blended_core.toy.world`. Photographs are split into those that training sees and those that are held back for measurements.
Everything is drawn from a seed, at any size; the networks are trained at 64×64. The pictures and their licenses are in
``data/world2``; :mod:`blended_core.training.world2_pictures` rebuilds them.
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
from . import world
from .world2_sources import DESIGNS, DRAWINGS, HELD_BACK, PHOTOGRAPHS, TRAINING

SIDE = 64  # pixels of a training scene
DATA = Path(__file__).with_name("data") / "world2"
SPRITE_SIDE = 96
WORDS = tuple(DRAWINGS)
DESIGN_NAMES = tuple(d.name for d in DESIGNS)
SIZES = (20 / SIDE, 52 / SIDE)
"""Range of an object's side as a fraction of the scene's."""
SMALLEST_CROP = 0.25
"""Of the photograph's short side: 64 of its 256 pixels."""
PHOTOGRAPHIC = 0.65
"""Share of scenes whose ground is a photograph."""

# Phrases that a caption may use for each ground, its name first.
GROUNDS: dict[str, tuple[str, ...]] = {
    **world.BACKGROUNDS,
    "mountains": ("mountains", "hills", "mountain"),
    "forest": ("forest", "woods", "trees and leaves"),
    "sky": ("sky", "clouds", "cloudy sky"),
    "rocks": ("rocks", "stones", "rock"),
}

UInt8Image = NDArray[np.uint8]
FloatImage = NDArray[np.float32]


@dataclass(frozen=True)
class Crop:
    """A square piece of a photograph: where it is in the room that its size leaves, and its side as a fraction of the short side."""

    photograph: str
    x: float = 0.5
    y: float = 0.5
    side: float = 1.0
    mirrored: bool = False
    gain: float = 1.0

    def __post_init__(self) -> None:
        if self.photograph not in _BY_NAME:
            raise BlendedError(f"world 2 has no photograph {self.photograph!r}; it has {', '.join(_BY_NAME)}.")


@dataclass(frozen=True)
class Placed:
    """An object in a scene; center and size as fractions of each axis and of the scene's shorter side."""

    name: str
    design: str
    x: float
    y: float
    size: float
    mirrored: bool = False
    angle: float = 0.0
    """Degrees, counterclockwise."""
    shadow: float = 0.0
    """How dark the middle of the shadow below it is, 0 to 1."""

    def __post_init__(self) -> None:
        if self.name not in WORDS:
            raise BlendedError(f"world 2 has no object {self.name!r}; it has {', '.join(WORDS)}.")
        if self.design not in DESIGN_NAMES:
            raise BlendedError(f"world 2 has no design {self.design!r}; it has {', '.join(DESIGN_NAMES)}.")

    def square(self, width: int, height: int) -> tuple[int, int, int]:
        """(left, top, side) in pixels where it is drawn in a picture of that size; it may reach beyond."""
        side = max(1, round(self.size * min(width, height)))
        return round(self.x * width - side / 2), round(self.y * height - side / 2), side


@dataclass(frozen=True)
class Scene:
    """What a picture of the world shows: a photograph's crop, or a drawn ground (a scene of world 1 without objects)."""

    ground: Crop | world.Scene
    objects: tuple[Placed, ...] = ()

    @property
    def word(self) -> str:
        """The ground's name, a key of GROUNDS."""
        return _BY_NAME[self.ground.photograph].ground if isinstance(self.ground, Crop) else self.ground.background


_BY_NAME = {p.name: p for p in PHOTOGRAPHS}


def photographs(split: str) -> tuple[str, ...]:
    """Names of the photographs of ``training`` or ``held back``."""
    if split not in (TRAINING, HELD_BACK):
        raise BlendedError(f"a split is {TRAINING!r} or {HELD_BACK!r}, not {split!r}.")
    return tuple(p.name for p in PHOTOGRAPHS if p.split == split)


@lru_cache(maxsize=len(PHOTOGRAPHS))
def photograph(name: str) -> Image.Image:
    """The stored photograph, 256 pixels on its short side."""
    return Image.open(DATA / "photographs" / _BY_NAME[name].file, formats=("JPEG",)).convert("RGB")


@lru_cache(maxsize=1)
def _sheet() -> Image.Image:
    return Image.open(DATA / "sprites.webp", formats=("WEBP",)).convert("RGBA")


@lru_cache(maxsize=len(WORDS) * len(DESIGN_NAMES))
def _drawing(name: str, design: str) -> Image.Image:
    """An object as stored, premultiplied."""
    x, y = DESIGN_NAMES.index(design) * SPRITE_SIDE, WORDS.index(name) * SPRITE_SIDE
    return _sheet().crop((x, y, x + SPRITE_SIDE, y + SPRITE_SIDE)).convert("RGBa")


def sprite(placed: Placed, side: int) -> FloatImage:
    """An object as [side, side, 4] float32 in 0..1, color premultiplied by alpha."""
    picture = _drawing(placed.name, placed.design).resize((side, side), Image.Resampling.BILINEAR)
    if placed.mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if placed.angle:
        picture = picture.rotate(placed.angle, Image.Resampling.BICUBIC)
    values = np.frombuffer(picture.tobytes(), np.uint8).reshape(side, side, 4).astype(np.float32)
    values /= 255
    return values


def draw_ground(ground: Crop | world.Scene, width: int = SIDE, height: int = SIDE) -> FloatImage:
    """The ground alone, [height, width, 3] float32 in 0..1."""
    if isinstance(ground, world.Scene):
        return world.draw_background(ground, width, height)
    picture = photograph(ground.photograph)
    scale = ground.side * min(picture.width / width, picture.height / height)
    w, h = width * scale, height * scale
    left, top = ground.x * (picture.width - w), ground.y * (picture.height - h)
    piece = picture.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + w, top + h))
    out: FloatImage = (np.asarray(piece, np.float32) / 255 * ground.gain).clip(0, 1)
    return np.ascontiguousarray(out[:, ::-1]) if ground.mirrored else out


def cast_shadow(picture: FloatImage, placed: Placed) -> None:
    """Darkens the ground below an object, in place: a soft ellipse at its foot."""
    height, width = picture.shape[:2]
    left, top, side = placed.square(width, height)
    yy = (np.arange(height, dtype=np.float32)[:, None] + 0.5 - (top + 0.95 * side)) / (0.11 * side)
    xx = (np.arange(width, dtype=np.float32)[None, :] + 0.5 - (left + 0.5 * side)) / (0.38 * side)
    picture *= 1 - placed.shadow * np.exp(-(xx**2) - yy**2)[..., None]


def draw(scene: Scene, width: int = SIDE, height: int = SIDE, ground: FloatImage | None = None) -> FloatImage:
    """The scene, [height, width, 3] float32 in 0..1; its objects on another ``ground`` of that size if one is given."""
    picture = (draw_ground(scene.ground, width, height) if ground is None else ground).copy()
    for placed in scene.objects:
        left, top, side = placed.square(width, height)
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, width), min(top + side, height)
        if x0 >= x1 or y0 >= y1:
            continue
        if placed.shadow:
            cast_shadow(picture, placed)
        s = sprite(placed, side)[y0 - top : y1 - top, x0 - left : x1 - left]
        view = picture[y0:y1, x0:x1]
        view *= 1 - s[..., 3:]
        view += s[..., :3]
    clipped: FloatImage = picture.clip(0, 1)
    return clipped


def render(scene: Scene, width: int = SIDE, height: int = SIDE) -> UInt8Image:
    """The scene as an 8-bit RGB picture [height, width, 3]."""
    return (draw(scene, width, height) * 255 + 0.5).astype(np.uint8)


def random_ground(rng: np.random.Generator, split: str = TRAINING, photographic: float = PHOTOGRAPHIC) -> Crop | world.Scene:
    """A crop of any size of one of the split's photographs, or a drawn ground."""
    if rng.uniform() >= photographic:
        background = list(world.BACKGROUNDS)[int(rng.integers(len(world.BACKGROUNDS)))]
        return world.Scene(background, (), int(rng.integers(2**31)), float(rng.uniform(0.2, 0.8)))
    names = photographs(split)
    return Crop(
        photograph=names[int(rng.integers(len(names)))],
        x=float(rng.uniform()),
        y=float(rng.uniform()),
        side=float(np.exp(rng.uniform(np.log(SMALLEST_CROP), 0))),
        mirrored=bool(rng.uniform() < 0.5),
        gain=float(rng.uniform(0.85, 1.1)),
    )


def random_object(
    rng: np.random.Generator,
    *,
    names: Sequence[str] = WORDS,
    size: tuple[float, float] = SIZES,
    wander: float = 0.08,
    variety: float = 1.0,
) -> Placed:
    """An object about the middle: ``wander`` is the standard deviation of its place as a fraction of the scene's side.

    ``variety`` is the share of objects of any design; the others are of the first. Mirrored and rotated ones and shadows become as rare.
    """
    side = float(rng.uniform(*size))
    x, y = (float(np.clip(0.5 + wander * rng.normal(), 0.3 * side, 1 - 0.3 * side)) for _ in range(2))
    return Placed(
        name=names[int(rng.integers(len(names)))],
        design=DESIGN_NAMES[int(rng.integers(len(DESIGN_NAMES))) if rng.uniform() < variety else 0],
        x=x,
        y=y,
        size=side,
        mirrored=bool(rng.uniform() < 0.5 * variety),
        angle=float(rng.normal(0, 6)) if rng.uniform() < 0.7 * variety else 0.0,
        shadow=float(rng.uniform(0.1, 0.4)) if rng.uniform() < 0.35 * variety else 0.0,
    )


def random_scene(
    rng: np.random.Generator,
    *,
    objects: int | None = None,
    names: Sequence[str] = WORDS,
    size: tuple[float, float] = SIZES,
    wander: float = 0.08,
    variety: float = 1.0,
    split: str = TRAINING,
    photographic: float = PHOTOGRAPHIC,
) -> Scene:
    """A scene from the generator: one object mostly, none in a tenth, two in a twentieth of all cases.

    Args:
        rng: source of every choice.
        objects: 0, 1 or 2 to fix their number.
        names: objects to choose from.
        size: range of an object's side as a fraction of the scene's, for scenes with one object.
        wander, variety: see :func:`random_object`; a tenth of the objects of any variety may be anywhere.
        split: which photographs may be the ground.
        photographic: share of photographs among the grounds.
    """
    if objects is None:
        objects = int(rng.choice(3, p=(0.1, 0.85, 0.05)))
    ground = random_ground(rng, split, photographic)
    if objects < 2:
        spread = 0.3 if rng.uniform() < 0.1 * variety else wander
        return Scene(ground, tuple(random_object(rng, names=names, size=size, wander=spread, variety=variety) for _ in range(objects)))
    placed = []
    for i in range(objects):
        one = random_object(rng, names=names, size=(24 / SIDE, 30 / SIDE), wander=0, variety=variety)
        x = float(rng.uniform(i / 2 + one.size / 2, (i + 1) / 2 - one.size / 2))
        y = float(rng.uniform(one.size / 2, 1 - one.size / 2))
        placed.append(Placed(one.name, one.design, x, y, one.size, one.mirrored, one.angle, one.shadow))
    return Scene(ground, tuple(placed))
