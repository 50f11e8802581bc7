"""The part of a picture around the mask: cut out, scaled to the model's size, pasted back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import BlendedError, Note
from .mask import THRESHOLD, Box, EditMask, distance_inward, final_paste

SMALLEST = 4
"""A region is at least 1/SMALLEST of the model's side, however small the mask: beyond that enlarging shows CLIP a blur."""
SNAP = 1.6
"""A region is widened to the model's own side, where nothing has to be resampled, if that is at most this factor away."""
LONGEST_ASPECT = 4.0
"""Of a rectangle; latent diffusion models were trained on no longer ones."""
STRETCH = 1.05
"""How far a cut may be stretched along one axis so that its region ends with the picture, where nothing has to be invented."""
SEAM_MARGIN = 3
"""Pixels around the mask within which its seam is measured; :func:`pasted_part` contains them."""
ASPECT_TOLERANCE = 0.02
"""Relative difference of two aspect ratios up to which one picture is scaled to the size of the other."""


@dataclass(frozen=True)
class Region:
    """A square or rectangle of a picture in whole pixels, which may reach beyond the picture's edges.

    ``left`` and ``top`` may be negative; ``width`` and ``height`` are those of the picture. The region has ``side`` columns and ``down`` rows; 0 rows
    mean a square. What lies beyond the edges is filled by reflection when the region is cut, is never edited, and is dropped when it is put back.
    """

    left: int
    top: int
    side: int
    width: int
    height: int
    down: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """(rows, columns) of the region."""
        return self.down or self.side, self.side

    def cut(self, picture: Tensor, size: int | tuple[int, int]) -> Tensor:
        """[B, C, height, width] → the region at a side or (rows, columns), [B, C, rows, columns]. Exact where that is its own size."""
        rows = _reflected(self.top, self.size[0], self.height).to(picture.device)
        columns = _reflected(self.left, self.side, self.width).to(picture.device)
        first, last = int(columns.min()), int(columns.max())
        narrow = picture[..., first : last + 1]  # rows of a large picture are not copied at its full width
        return resize(narrow.index_select(2, rows).index_select(3, columns - first), size)

    def cut_mask(self, mask: EditMask, size: int | tuple[int, int]) -> EditMask:
        """[B, 1, height, width] → [B, 1, rows, columns]; 0 beyond the edges of the picture.

        A binary mask stays binary. Where it is so small or thin that nothing of it would be left at the model's size (an island, a line, or more than
        half of all of it), every pixel that it touches is inside.
        """
        inner = self.inner()
        canvas = mask.values.new_zeros(len(mask), 1, *self.size)
        canvas[self._in_region(inner).slices] = mask.values[inner.slices]
        target = (size, size) if isinstance(size, int) else size
        if self.size == target:
            small = canvas
        elif math.prod(self.size) > math.prod(target):
            small = F.interpolate(canvas, size=target, mode="area")
        else:
            small = F.interpolate(canvas, size=target, mode="bilinear", align_corners=False)
        if mask.soft:
            return mask.with_values(small.clamp(0, 1))
        half = (small >= THRESHOLD).to(small.dtype)
        touched = (small > 0).to(small.dtype)
        thin = half.sum(dim=(1, 2, 3), keepdim=True) < 0.5 * small.sum(dim=(1, 2, 3), keepdim=True)
        # A pixel is lost if nothing near it represents it; enlarging spreads the edge of a mask over that many pixels.
        reach = max(1, *(math.ceil(new / old) for new, old in zip(target, self.size, strict=True)))
        lost = touched * (1 - F.max_pool2d(half, 2 * reach + 1, 1, reach))
        return mask.with_values(torch.where(thin, touched, torch.maximum(half, lost)))

    def put_back(self, edited: Tensor, picture: Tensor) -> Tensor:
        """The picture with the region replaced, [B, C, height, width]; ``edited`` shows it at any size, in the values of the picture."""
        inner = self.inner()
        out = picture.expand(len(edited), -1, -1, -1).clone()
        out[inner.slices] = resize(edited, self.size)[self._in_region(inner).slices]
        return out

    def _in_region(self, box: Box) -> Box:
        return Box(box.left - self.left, box.top - self.top, box.right - self.left, box.bottom - self.top)

    def within(self, box: Box) -> Region:
        """The same region, of the part of the picture in a box."""
        return Region(self.left - box.left, self.top - box.top, self.side, box.right - box.left, box.bottom - box.top, self.down)

    def inner(self) -> Box:
        """The part of the region that lies in the picture."""
        return Box(max(self.left, 0), max(self.top, 0), min(self.left + self.side, self.width), min(self.top + self.size[0], self.height))


def region_around(mask: EditMask, model_size: int, context: float = 1.6) -> Region:
    """The square that an edit works on.

    Args:
        mask: [B, 1, H, W]; several islands, and several masks, are covered by one square.
        model_size: the side in pixels that the model was trained at.
        context: side of the square over the longer side of the mask; at least 1. More shows the model more of the surroundings, and gives the edit
            fewer pixels.

    Returns:
        A region inside the picture where it fits. Where the mask is longer than the shorter side of the picture, the region reaches beyond that side.

    Raises:
        BlendedError: for an empty mask, or a context below 1.
    """
    check_context(context)
    height, width = int(mask.values.shape[-2]), int(mask.values.shape[-1])
    box = mask.box()
    longer = max(box.right - box.left, box.bottom - box.top)
    side = max(math.ceil(longer * context), -(-model_size // SMALLEST))
    side = max(min(side, max(width, height)), longer)
    if side != model_size and 1 / SNAP <= side / model_size <= SNAP and longer * min(context, 1.1) <= model_size <= max(width, height):
        side = model_size
    return Region(_place(box.left, box.right, side, width), _place(box.top, box.bottom, side, height), side, width, height)


def check_context(context: float) -> None:
    """Raises BlendedError for a context below 1."""
    if not (math.isfinite(context) and context >= 1):
        raise BlendedError(f"context is {context}; give 1 (the mask alone) or more (default 1.6).", option="context")


def aspect_around(mask: EditMask, context: float = 1.6) -> float:
    """Width over height of a mask with its context, as far as the picture reaches; at most :data:`LONGEST_ASPECT`. Arguments as for :func:`region_around`."""
    width, height = _wanted(mask.box(), context)
    aspect = min(width, mask.values.shape[-1]) / min(height, mask.values.shape[-2])
    return min(max(aspect, 1 / LONGEST_ASPECT), LONGEST_ASPECT)


def size_of_aspect(aspect: float, side: int, multiple: int) -> tuple[int, int]:
    """(height, width) of an aspect ratio with about side² pixels, both multiples of a number."""

    def rounded(length: float) -> int:
        return max(round(length / multiple), 1) * multiple

    return rounded(side / math.sqrt(aspect)), rounded(side * math.sqrt(aspect))


def rectangle_around(mask: EditMask, size: tuple[int, int], context: float = 1.6) -> Region:
    """The rectangle of the shape of (height, width) that an edit works on. Other arguments and errors as for :func:`region_around`.

    Where the picture is too small for that shape by less than :data:`STRETCH`, the region ends with the picture, and its cut is stretched a little.
    """
    check_context(context)
    height, width = int(mask.values.shape[-2]), int(mask.values.shape[-1])
    box = mask.box()
    (rows, columns), needed = size, (box.bottom - box.top, box.right - box.left)
    wanted = _wanted(box, context)
    scale = max(wanted[0] / columns, wanted[1] / rows, 1 / SMALLEST)  # pixels of the picture for one of the cut
    scale = max(min(scale, max(width / columns, height / rows)), needed[1] / columns, needed[0] / rows)
    least = min(context, 1.1)
    if 1 / SNAP <= scale <= SNAP and needed[0] * least <= rows <= height and needed[1] * least <= columns <= width:
        scale = 1.0

    def length(cut: int, mask: int, picture: int) -> int:
        own = max(math.ceil(cut * scale - 1e-6), mask)
        return picture if picture < own <= picture * STRETCH else own

    down, across = length(rows, needed[0], height), length(columns, needed[1], width)
    return Region(_place(box.left, box.right, across, width), _place(box.top, box.bottom, down, height), across, width, height, down)


def _wanted(box: Box, context: float) -> tuple[float, float]:
    """Width and height of a mask's box with the same margin on all sides, that of :func:`region_around` for its longer side."""
    width, height = box.right - box.left, box.bottom - box.top
    margin = max(width, height) * (context - 1)
    return width + margin, height + margin


def _place(low: int, high: int, side: int, length: int) -> int:
    """Where a run of ``side`` begins so that low..high is in its middle, within 0..length if it fits there."""
    if side >= length:
        return -((side - length) // 2)
    return min(max((low + high - side) // 2, 0), length - side)


def _reflected(start: int, count: int, length: int) -> Tensor:
    """Indices start..start+count, those outside 0..length−1 reflected at the edge pixels, however far."""
    position = torch.arange(start, start + count)
    if length == 1:
        return torch.zeros_like(position)
    period = 2 * (length - 1)
    position = position.remainder(period)
    return torch.where(position >= length, period - position, position)


def resize(picture: Tensor, size: int | tuple[int, int]) -> Tensor:
    """[B, C, H, W] → the given side or (height, width), bicubic, antialiased when it shrinks; unchanged if it fits."""
    target = (size, size) if isinstance(size, int) else size
    if tuple(picture.shape[-2:]) == target:
        return picture
    return F.interpolate(picture, size=target, mode="bicubic", align_corners=False, antialias=True)


def same_aspect(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two (height, width) have one aspect ratio, up to :data:`ASPECT_TOLERANCE` or the rounding of a scaled size to whole pixels."""

    def rounding(one: tuple[int, int], two: tuple[int, int]) -> float:
        return min(abs(one[0] - one[1] * two[0] / two[1]), abs(one[1] - one[0] * two[1] / two[0]))

    ratio = size[1] * other[0] / (size[0] * other[1])
    return min(rounding(size, other), rounding(other, size)) < 1 or abs(ratio - 1) <= ASPECT_TOLERANCE


class PictureRegion(Protocol):
    """What an edit works on: a :class:`Region`, or the whole picture squashed to a square (:mod:`~blended_core.reference`)."""

    @property
    def width(self) -> int:
        """Of the picture, in pixels."""
        ...

    @property
    def height(self) -> int:
        """Of the picture, in pixels."""
        ...

    def cut(self, picture: Tensor, size: int) -> Tensor:
        """[B, C, height, width] → [B, C, size, size]."""
        ...

    def cut_mask(self, mask: EditMask, size: int) -> EditMask:
        """[B, 1, height, width] → [B, 1, size, size]."""
        ...

    def put_back(self, edited: Tensor, picture: Tensor) -> Tensor:
        """The picture with the region replaced, [B, C, height, width]."""
        ...

    def inner(self) -> Box:
        """The part of the picture that the region shows."""
        ...

    def within(self, box: Box) -> PictureRegion:
        """The same region, of the part of the picture in a box."""
        ...


def paste(
    edited: Tensor, original: Tensor, mask: EditMask, region: PictureRegion, feather: int = 0, keep_background: bool = True
) -> Tensor:
    """Puts an edited region back into the original.

    Args:
        edited: [B, C, S, S] in −1..1.
        original: [B or 1, C, H, W] in 0..1.
        mask: [B or 1, 1, H, W] in the frame of the original.
        region: that was cut out.
        feather: pixels over which the edit fades in, inward.
        keep_background: False puts back the whole region, also outside the mask (Algorithm 1).

    Returns:
        [B, C, H, W] in the original's dtype; with ``keep_background`` the original bit for bit outside the mask.
    """
    box, part = pasted_part(edited, original, mask, region, feather, keep_background)
    if part.shape[-2:] == original.shape[-2:]:
        return part
    out = original.expand(len(part), -1, -1, -1).clone()
    out[box.slices] = part
    return out


def pasted_part(
    edited: Tensor, original: Tensor, mask: EditMask, region: PictureRegion, feather: int = 0, keep_background: bool = True
) -> tuple[Box, Tensor]:
    """The part of :func:`paste` that can differ from the original, so that nothing is computed or copied for the rest of a large picture.

    Returns:
        Its box: the region and :data:`SEAM_MARGIN` pixels or more around it; without ``keep_background`` the whole picture. And its pixels
        [B, C, h, w], as :func:`paste` returns them.
    """
    values = (edited.to(original) + 1) / 2
    if not keep_background:
        return Box(0, 0, region.width, region.height), region.put_back(values, original).clamp(0, 1)
    return pasted_values(values, original, mask, region, feather)


def pasted_values(values: Tensor, original: Tensor, mask: EditMask, region: PictureRegion, feather: int = 0) -> tuple[Box, Tensor]:
    """:func:`pasted_part` of an edited region in the values of the original, 0..1."""
    # The mask lies in the region; the feather reads a little beyond.
    box = region.inner().grown(max(feather + 1, SEAM_MARGIN), region.width, region.height)
    part = original[box.slices]
    return box, final_paste(region.within(box).put_back(values, part), part, mask.part(box), feather)


def feather_notes(mask: EditMask, region: PictureRegion, feather: int) -> list[Note]:
    """What the user should know about a feather, in the arguments of :func:`paste`: whether it is wider than the mask is deep."""
    if not feather:
        return []
    around = region.inner().grown(feather + 1, region.width, region.height)
    deepest = float(distance_inward(mask.inside[around.slices], feather).max())
    if deepest >= feather:
        return []
    return [
        Note(
            f"The feather of {feather} pixels is wider than the mask, whose middle is {deepest:.0f} pixels from its edge: the result shows at most "
            f"{deepest / feather:.0%} of the edit. Lower the feather, or widen the mask.",
            option="feather",
        )
    ]
