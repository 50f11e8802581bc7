"""What CLIP and the judge of world 2 learn from: masked scenes with their truth, sentences about them, and what goes wrong in edits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from ..toy import corrupt, world
from ..toy.captions import Caption, article
from ..toy.world2 import GROUNDS, SIDE, SIZES, WORDS, FloatImage, Placed, Scene, draw, draw_ground, random_ground, random_scene, sprite
from ..toy.world2_sources import TRAINING

NONE = "none"
SHOWN, HIDDEN = 0.55, 0.1
"""An object counts as shown if the mask covers this share of it, and as hidden below the other; cases between are left out."""

SYNONYMS: dict[str, tuple[str, ...]] = {name: world.OBJECTS[name].synonyms for name in WORDS}
# Colors that all designs of a word share.
COLORS: dict[str, str] = {
    "apple": "red", "balloon": "red", "cactus": "green", "car": "blue", "frog": "green", "mushroom": "red", "pumpkin": "orange",
    "rose": "red", "sunflower": "yellow", "tree": "green",
}  # fmt: skip
_OPENINGS = ("", "", "a picture of ", "a photo of ", "an image of ", "there is ", "an emoji of ", "this is ")
_ADJECTIVES = ("", "", "", "nice ", "big ", "small ", "little ", "cute ", "cartoon ", "single ")
_PLACES = (
    "in the {}",
    "on the {}",
    "at the {}",
    "in front of the {}",
    "with {} behind",
    "and {}",
    "in a {}",
    "by the {}",
    "at {}",
    "in {}",
)
_EMPTY = ("{}", "a {}", "the {}", "an empty {}", "only {}", "nothing but {}", "just the {}", "plain {}", "a {} scene", "a {} landscape",
          "a {} background", "a {} with nothing on it")  # fmt: skip


def describe(rng: np.random.Generator, things: frozenset[str], ground: str) -> Caption:
    """A varied true sentence about a picture of these objects before this ground, which half of the sentences name."""

    def one_of(options: tuple[str, ...]) -> str:
        return options[int(rng.integers(len(options)))]

    place = one_of(GROUNDS[ground])
    if not things:
        return Caption(one_of(_OPENINGS) + one_of(_EMPTY).format(place), None, ground)
    thing = sorted(things)[int(rng.integers(len(things)))]
    noun = thing if rng.uniform() < 0.6 else one_of(SYNONYMS[thing])
    if rng.uniform() < 0.25 and thing in COLORS and COLORS[thing] not in noun:
        noun = f"{COLORS[thing]} {noun}"
    noun = one_of(_ADJECTIVES) + noun
    if rng.uniform() < 0.75:
        noun = article(noun)
    text = one_of(_OPENINGS) + noun
    if rng.uniform() < 0.5:
        return Caption(f"{text} {one_of(_PLACES).format(place)}", thing, ground)
    return Caption(text, thing, None)


def mask_in(rng: np.random.Generator, cx: float, cy: float, half: tuple[float, float]) -> FloatImage:
    """[64, 64], 1 inside an ellipse, rounded rectangle or rectangle about a center, given in fractions."""
    yy, xx = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / SIDE + 0.5 / SIDE
    power = float(rng.choice([2.0, 2.0, 4.0, 16.0]))
    radius = (np.abs(xx - cx) / max(half[0], 1e-3)) ** power + (np.abs(yy - cy) / max(half[1], 1e-3)) ** power
    mask: FloatImage = (radius <= 1).astype(np.float32)
    return mask


def coverage(mask: FloatImage, placed: Placed) -> float:
    """The share of an object's inner disc that a mask shows."""
    yy, xx = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / SIDE + 0.5 / SIDE
    disc = (xx - placed.x) ** 2 + (yy - placed.y) ** 2 <= (0.4 * placed.size) ** 2
    return float(mask[disc].mean()) if disc.any() else 0.0


def random_mask(rng: np.random.Generator, scene: Scene) -> FloatImage | None:
    """A mask around one of the objects, or anywhere; None if it shows too little or neither shows nor hides an object."""
    if scene.objects and rng.uniform() < 0.8:
        placed = scene.objects[int(rng.integers(len(scene.objects)))]
        half = placed.size / 2 * rng.uniform(0.9, 1.8, 2)
        cx, cy = placed.x + rng.normal(0, 0.05), placed.y + rng.normal(0, 0.05)
    else:
        half, (cx, cy) = rng.uniform(0.15, 0.42, 2), rng.uniform(0.25, 0.75, 2)
    mask = mask_in(rng, cx, cy, (float(half[0]), float(half[1])))
    if mask.mean() < 0.03 or any(HIDDEN < coverage(mask, placed) < SHOWN for placed in scene.objects):
        return None
    return mask


# --- what goes wrong --------------------------------------------------------------------------------------------------


def corrupted(rng: np.random.Generator, scene: Scene) -> FloatImage:
    """A scene whose one object is scrambled, cut off, mixed with another or a blob; [64, 64, 3] in 0..1."""
    placed, picture, empty = scene.objects[0], draw(scene), draw_ground(scene.ground)
    plain = world.Placed(placed.name, placed.x, placed.y, placed.size)
    match int(rng.integers(4)):
        case 0:
            return corrupt.scrambled(rng, picture, plain)
        case 1:
            return corrupt.fragment(rng, picture, empty, plain)
        case 2:
            name = WORDS[(WORDS.index(placed.name) + int(rng.integers(1, len(WORDS)))) % len(WORDS)]
            other = draw(replace(scene, objects=(replace(placed, name=name),)))
            if rng.uniform() < 0.4:
                share = rng.uniform(0.35, 0.65)
                through: FloatImage = (picture * share + other * (1 - share)).astype(np.float32)
                return through
            halves: FloatImage = np.where(side_of(rng, placed)[..., None] > 0, picture, other)
            return halves
        case _:
            return blob(rng, empty, placed)


def side_of(rng: np.random.Generator, placed: Placed) -> FloatImage:
    """[64, 64]: the signed distance from a random line about through an object's middle, in fractions."""
    yy, xx = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / SIDE
    angle = rng.uniform(0, 2 * np.pi)
    distance: FloatImage = (xx - placed.x) * np.cos(angle) + (yy - placed.y) * np.sin(angle) - rng.uniform(-0.08, 0.08) * placed.size
    return distance


def blob(rng: np.random.Generator, empty: FloatImage, placed: Placed) -> FloatImage:
    """A shapeless patch in the object's own colors."""
    pixels = sprite(placed, 32).reshape(-1, 4)
    pixels = pixels[pixels[:, 3] > 0.9][:, :3]
    cells = int(rng.integers(2, 7))
    knots = torch.from_numpy(pixels[rng.integers(len(pixels), size=cells * cells)].reshape(cells, cells, 3)).permute(2, 0, 1)[None]
    colors = F.interpolate(knots, (SIDE, SIDE), mode="bilinear", align_corners=True)[0].permute(1, 2, 0).numpy()
    yy, xx = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / SIDE
    radius = np.hypot(xx - placed.x, yy - placed.y) / (placed.size / 2)
    alpha = corrupt.sigmoid((0.8 - radius - 0.35 * noise(rng, 4)) * rng.uniform(6, 20))[..., None]
    patch: FloatImage = (colors * alpha + empty * (1 - alpha)).astype(np.float32)
    return patch


def noise(rng: np.random.Generator, cells: int) -> FloatImage:
    """[64, 64] of smooth noise with a standard deviation of about one."""
    knots = torch.from_numpy(rng.normal(size=(1, 1, cells + 1, cells + 1)).astype(np.float32))
    field: FloatImage = F.interpolate(knots, (SIDE, SIDE), mode="bicubic", align_corners=True)[0, 0].numpy()
    return field


def damaged(rng: np.random.Generator, ground: FloatImage, mask: FloatImage, other: Callable[[], FloatImage]) -> FloatImage:
    """A ground that is wrong inside the mask: of another tone, blurred, patchy, or another ground."""
    soft = box_blur(mask, int(rng.integers(0, 4)))
    match int(rng.integers(5)):
        case 0 | 1:  # a disc: mostly one sign in all channels
            shift = rng.uniform(0.025, 0.16) * rng.choice([-1.0, 1.0]) * (1 + 0.4 * rng.normal(size=3))
            wrong = ground + shift.astype(np.float32)
        case 2:
            wrong = box_blur(ground, int(rng.integers(3, 7)))
        case 3:
            fields = np.stack([noise(rng, int(rng.integers(2, 9))) for _ in range(3)], -1)
            wrong = ground + rng.uniform(0.05, 0.15) * fields
        case _:
            wrong = other()
    out: FloatImage = (ground + (wrong - ground) * soft.reshape(SIDE, SIDE, 1)).clip(0, 1).astype(np.float32)
    return out


def box_blur(picture: FloatImage, radius: int) -> FloatImage:
    """The mean over squares of 2·radius + 1 pixels of [64, 64] or [64, 64, C]."""
    if not radius:
        return picture
    x = torch.from_numpy(np.ascontiguousarray(picture.reshape(SIDE, SIDE, -1))).permute(2, 0, 1)[None]
    x = F.avg_pool2d(F.pad(x, (radius,) * 4, mode="replicate"), 2 * radius + 1, 1)
    out: FloatImage = x[0].permute(1, 2, 0).numpy().reshape(picture.shape)
    return out


# --- cases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A masked picture [64, 64, 3] in 0..1 and its truth: what the mask shows (NONE: no whole object), whether the ground in it is intact."""

    picture: FloatImage
    mask: FloatImage
    answer: str
    ground: str
    intact: bool | None
    """None: not to be asked, since what is corrupted is neither an object nor ground."""


def random_case(rng: np.random.Generator, split: str = TRAINING, corrupt_share: float = 0.25, damage_share: float = 0.4) -> Case:
    """A case for the judge: one object or none in the mask, whole or corrupted, on a ground that is intact or damaged."""
    while True:
        scene = random_scene(rng, split=split, size=(SIZES[0], 56 / SIDE))
        mask = random_mask(rng, scene)
        if mask is None:
            continue
        inside = [placed for placed in scene.objects if coverage(mask, placed) >= SHOWN]
        if len(inside) > 1:
            continue
        if inside and len(scene.objects) == 1 and rng.uniform() < corrupt_share:
            return Case(corrupted(rng, scene), mask, NONE, scene.word, None)
        answer = inside[0].name if inside else NONE
        if rng.uniform() >= damage_share:
            return Case(draw(scene), mask, answer, scene.word, True)
        base = draw_ground(scene.ground)
        wrong = damaged(rng, base, mask, lambda: draw_ground(random_ground(rng, split)))
        if np.abs(wrong - base)[mask > 0].mean() < 0.02:
            continue  # blurring a plain ground changes nothing
        return Case(draw(scene, ground=wrong), mask, answer, scene.word, False)
