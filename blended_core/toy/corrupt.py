"""Corrupted objects of the embedded world. They imitate the artifacts of guidance that lower the CLIP distance without showing an object.

The judge is trained to answer "none" for them. A CLIP trained with ``--corrupt`` rejects them too; the embedded CLIP was trained without it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from .models import SIDE
from .world import OBJECTS, FloatImage, Placed, Scene, draw_background, render, sprite

NAMES = list(OBJECTS)


def corrupted(rng: np.random.Generator, scene: Scene) -> FloatImage:
    """A scene whose single object is scrambled, cut off, mixed with another object or replaced by a blob; [64, 64, 3] in 0..1."""
    placed, picture, empty = scene.objects[0], render_float(scene), draw_background(scene)
    match int(rng.integers(4)):
        case 0:
            return scrambled(rng, picture, placed)
        case 1:
            return fragment(rng, picture, empty, placed)
        case 2:
            return mixture(rng, picture, scene, placed)
        case _:
            return blob(rng, empty, placed)


def render_float(scene: Scene) -> FloatImage:
    """The scene as float32 [64, 64, 3] in 0..1."""
    picture: FloatImage = (render(scene) / 255).astype(np.float32)
    return picture


def sigmoid(x: FloatImage) -> FloatImage:
    """The logistic function, with its input clipped to ±30."""
    out: FloatImage = (1 / (1 + np.exp(-np.clip(x, -30, 30)))).astype(np.float32)
    return out


def bounding_box(placed: Placed) -> tuple[slice, slice]:
    """The rows and columns that an object covers."""
    left, top, side = placed.square(SIDE, SIDE)
    return slice(max(top, 0), min(top + side, SIDE)), slice(max(left, 0), min(left + side, SIDE))


def scrambled(rng: np.random.Generator, picture: FloatImage, placed: Placed) -> FloatImage:
    """The object cut into tiles, which are permuted and partly rotated or mirrored."""
    rows, columns = bounding_box(placed)
    grid = int(rng.integers(2, 5))
    height, width = (rows.stop - rows.start) // grid, (columns.stop - columns.start) // grid
    out: FloatImage = picture.copy()
    order = rng.permutation(grid * grid)
    while (order == np.arange(grid * grid)).mean() > 0.25:
        order = rng.permutation(grid * grid)

    def cell(index: int) -> tuple[slice, slice]:
        top, left = rows.start + index // grid * height, columns.start + index % grid * width
        return slice(top, top + height), slice(left, left + width)

    for target, origin in enumerate(order):
        tile = picture[cell(int(origin))]
        out[cell(target)] = np.rot90(tile, int(rng.integers(4))) if height == width else tile[:, :: int(rng.choice((-1, 1)))]
    return out


def fragment(rng: np.random.Generator, picture: FloatImage, empty: FloatImage, placed: Placed) -> FloatImage:
    """At most two fifths of the object, cut off along a straight soft edge."""
    yy, xx = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    distance = ((xx / SIDE - placed.x) * np.cos(angle) + (yy / SIDE - placed.y) * np.sin(angle)) / (placed.size / 2)
    alpha = sigmoid((distance - rng.uniform(0.25, 0.7)) * rng.uniform(8, 40))
    part: FloatImage = (picture * alpha[..., None] + empty * (1 - alpha[..., None])).astype(np.float32)
    return part


def mixture(rng: np.random.Generator, picture: FloatImage, scene: Scene, placed: Placed) -> FloatImage:
    """Two objects in one place: half of each side by side, or both blended."""
    name = NAMES[(NAMES.index(placed.name) + int(rng.integers(1, len(NAMES)))) % len(NAMES)]
    other = render_float(replace(scene, objects=(replace(placed, name=name),)))
    if rng.uniform() < 0.4:
        alpha = rng.uniform(0.35, 0.65)
        return picture * alpha + other * (1 - alpha)
    yy, xx = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / SIDE
    angle = rng.uniform(0, 2 * np.pi)
    first = ((xx - placed.x) * np.cos(angle) + (yy - placed.y) * np.sin(angle) > rng.uniform(-0.08, 0.08) * placed.size)[..., None]
    halves: FloatImage = np.where(first, picture, other)
    return halves


def blob(rng: np.random.Generator, empty: FloatImage, placed: Placed) -> FloatImage:
    """An irregular patch in the colors of the object."""
    pixels = sprite(placed.name, 32).reshape(-1, 4)
    pixels = pixels[pixels[:, 3] > 0.9][:, :3]
    cells = int(rng.integers(2, 7))
    knots = torch.from_numpy(pixels[rng.integers(len(pixels), size=cells * cells)].reshape(cells, cells, 3)).permute(2, 0, 1)[None]
    colors = F.interpolate(knots, (SIDE, SIDE), mode="bilinear", align_corners=True)[0].permute(1, 2, 0).numpy()
    noise = torch.from_numpy(rng.normal(size=(1, 1, 5, 5)).astype(np.float32))
    shape = F.interpolate(noise, (SIDE, SIDE), mode="bicubic", align_corners=True)[0, 0].numpy()
    yy, xx = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / SIDE
    radius = np.hypot(xx - placed.x, yy - placed.y) / (placed.size / 2)
    alpha = sigmoid((0.8 - radius - 0.35 * shape) * rng.uniform(6, 20))
    patch: FloatImage = (colors * alpha[..., None] + empty * (1 - alpha[..., None])).astype(np.float32)
    return patch
