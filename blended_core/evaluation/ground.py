"""How well an edit keeps the ground: its tone beside the edge of the mask, and its error where the true ground is known. In units of 1/255.

The ground is what a picture shows inside the mask and is not an object. docs/quality.md defines the measures.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..mask import distance_inward

RING = 4
"""Width in pixels of the ring inside the mask whose tone is measured."""
BLOCK = 8
"""Side in pixels of the blocks over which differences are averaged with their sign."""
FEWEST = 3
"""Pixels that a block needs to count."""
OBJECT = 32.0
"""A difference, averaged over 3×3 pixels, from which on a pixel shows an object and not the ground."""
MARGIN = 2
"""Pixels around an object that do not count either: its soft outline, its shadow."""


def tone_and_edge(pictures: Tensor, ground: Tensor, inside: Tensor) -> list[tuple[float | None, float | None]]:
    """(tone, edge) of each picture: the mean |signed difference| to the ground in the ring inside the mask, and in its outermost pixel.

    Args:
        pictures: [B, C, H, W] in 0..1. ground: [1, C, H, W], what was there before an object was added, or is there without it.
        inside: bool [1, 1, H, W].

    Returns:
        None where the ring shows no ground.
    """
    difference = (pictures - ground).double() * 255
    smooth = F.avg_pool2d(difference, 3, 1, 1, count_include_pad=False)
    objects = (smooth.abs().amax(1, keepdim=True) > OBJECT) & inside
    shown = F.max_pool2d(objects.double(), 2 * MARGIN + 1, 1, MARGIN) == 0
    distance = distance_inward(inside, RING + 1)
    tone, edge = (_mean_of_blocks(difference, inside & (distance <= width) & shown, 1) for width in (RING, 1))
    return list(zip(tone, edge, strict=True))


def ground_error(pictures: Tensor, ground: Tensor, inside: Tensor) -> list[tuple[float, float]]:
    """(RMSE, low-frequency RMS) inside the mask of each picture to the true ground. Arguments as for :func:`tone_and_edge`."""
    difference = (pictures - ground).double() * 255
    whole = inside.expand(len(pictures), -1, -1, -1)
    low = _mean_of_blocks(difference, whole, 2)
    squares = (difference.square() * whole).sum((1, 2, 3)) / (whole.sum((1, 2, 3)) * difference.shape[1])
    return [(float(square) ** 0.5, (mean or 0.0) ** 0.5) for square, mean in zip(squares, low, strict=True)]


def _mean_of_blocks(difference: Tensor, counted: Tensor, power: int) -> list[float | None]:
    """The mean, over the pixels that count, of |signed mean of a pixel's block| to a power; of each picture, over all channels."""
    height, width = difference.shape[-2:]
    padding = (0, -width % BLOCK, 0, -height % BLOCK)
    total, count = (F.avg_pool2d(F.pad(v, padding), BLOCK, divisor_override=1) for v in (difference * counted, counted.double()))
    count = torch.where(count >= min(FEWEST, float(count.max())), count, 0.0)
    means = (total / count.clamp(min=1)).abs() ** power
    sums, pixels = (means.mean(1, keepdim=True) * count).sum((1, 2, 3)), count.sum((1, 2, 3))
    return [float(s / n) if n else None for s, n in zip(sums, pixels, strict=True)]
