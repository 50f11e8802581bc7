"""Objects of the embedded world spoiled until they are none: what guidance paints when it finds a shorter way to please CLIP.

The judge learns that these are nothing; so does a CLIP trained with ``--spoil``, which the embedded one was not.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from .world import OBJECTS, SIDE, FloatImage, Placed, Scene, draw_background, render, sprite

NAMES = list(OBJECTS)


def spoiled(rng: np.random.Generator, scene: Scene) -> FloatImage:
    """A scene whose one object is scrambled, cut off, mixed with another or a blob; [64, 64, 3] in 0..1."""
    placed, picture, empty = scene.objects[0], as_picture(scene), draw_background(scene)
    match int(rng.integers(4)):
        case 0:
            return scrambled(rng, picture, placed)
        case 1:
            return fragment(rng, picture, empty, placed)
        case 2:
            return mixture(rng, picture, scene, placed)
        case _:
            return blob(rng, empty, placed)


def as_picture(scene: Scene) -> FloatImage:
    """[64, 64, 3] in 0..1."""
    picture: FloatImage = (render(scene) / 255).astype(np.float32)
    return picture


def sigmoid(x: FloatImage) -> FloatImage:
    """0 … 1 along a soft edge."""
    out: FloatImage = (1 / (1 + np.exp(-np.clip(x, -30, 30)))).astype(np.float32)
    return out


def box_of(placed: Placed) -> tuple[slice, slice]:
    """The rows and columns where an object is drawn."""
    left, top, side = placed.square(SIDE, SIDE)
    return slice(max(top, 0), min(top + side, SIDE)), slice(max(left, 0), min(left + side, SIDE))


def scrambled(rng: np.random.Generator, picture: FloatImage, placed: Placed) -> FloatImage:
    """The object cut into squares that are put back in another order, some turned."""
    rows, columns = box_of(placed)
    cut = int(rng.integers(2, 5))
    high, wide = (rows.stop - rows.start) // cut, (columns.stop - columns.start) // cut
    out: FloatImage = picture.copy()
    order = rng.permutation(cut * cut)
    while (order == np.arange(cut * cut)).mean() > 0.25:
        order = rng.permutation(cut * cut)
    for there, here in enumerate(order):
        (i, j), (k, m) = divmod(there, cut), divmod(int(here), cut)
        piece = picture[rows.start + k * high : rows.start + (k + 1) * high, columns.start + m * wide : columns.start + (m + 1) * wide]
        piece = np.rot90(piece, int(rng.integers(4))) if high == wide else piece[:, :: int(rng.choice((-1, 1)))]
        out[rows.start + i * high : rows.start + (i + 1) * high, columns.start + j * wide : columns.start + (j + 1) * wide] = piece
    return out


def fragment(rng: np.random.Generator, picture: FloatImage, empty: FloatImage, placed: Placed) -> FloatImage:
    """Two fifths of the object at most, cut off by a soft straight line."""
    yy, xx = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    across = ((xx / SIDE - placed.x) * np.cos(angle) + (yy / SIDE - placed.y) * np.sin(angle)) / (placed.size / 2)
    shown = sigmoid((across - rng.uniform(0.25, 0.7)) * rng.uniform(8, 40))
    part: FloatImage = (picture * shown[..., None] + empty * (1 - shown[..., None])).astype(np.float32)
    return part


def mixture(rng: np.random.Generator, picture: FloatImage, scene: Scene, placed: Placed) -> FloatImage:
    """Half of it another object: side by side, or through each other."""
    name = NAMES[(NAMES.index(placed.name) + int(rng.integers(1, len(NAMES)))) % len(NAMES)]
    other = as_picture(replace(scene, objects=(replace(placed, name=name),)))
    if rng.uniform() < 0.4:
        share = rng.uniform(0.35, 0.65)
        return picture * share + other * (1 - share)
    yy, xx = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / SIDE
    angle = rng.uniform(0, 2 * np.pi)
    first = ((xx - placed.x) * np.cos(angle) + (yy - placed.y) * np.sin(angle) > rng.uniform(-0.08, 0.08) * placed.size)[..., None]
    halves: FloatImage = np.where(first, picture, other)
    return halves


def blob(rng: np.random.Generator, empty: FloatImage, placed: Placed) -> FloatImage:
    """A shapeless patch in the object's own colours."""
    pixels = sprite(placed.name, 32).reshape(-1, 4)
    pixels = pixels[pixels[:, 3] > 0.9][:, :3]
    cells = int(rng.integers(2, 7))
    knots = torch.from_numpy(pixels[rng.integers(len(pixels), size=cells * cells)].reshape(cells, cells, 3)).permute(2, 0, 1)[None]
    colours = F.interpolate(knots, (SIDE, SIDE), mode="bilinear", align_corners=True)[0].permute(1, 2, 0).numpy()
    bumps = torch.from_numpy(rng.normal(size=(1, 1, 5, 5)).astype(np.float32))
    shape = F.interpolate(bumps, (SIDE, SIDE), mode="bicubic", align_corners=True)[0, 0].numpy()
    yy, xx = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / SIDE
    radius = np.hypot(xx - placed.x, yy - placed.y) / (placed.size / 2)
    alpha = sigmoid((0.8 - radius - 0.35 * shape) * rng.uniform(6, 20))
    patch: FloatImage = (colours * alpha[..., None] + empty * (1 - alpha[..., None])).astype(np.float32)
    return patch
