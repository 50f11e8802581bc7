"""The square around the mask: cut out, brought to the model's size, put back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import BlendedError
from .mask import THRESHOLD

SMALLEST = 4
"""A region is at least 1/SMALLEST of the model's side, however small the mask: beyond that enlarging shows CLIP a blur."""
SNAP = 1.6
"""A region is widened to the model's own side, where nothing has to be resampled, if that is at most this factor away."""


@dataclass(frozen=True)
class Region:
    """A square of a picture in whole pixels, which may reach beyond the picture's edges.

    ``left`` and ``top`` may be negative; ``width`` and ``height`` are those of the picture. What lies beyond the edges is
    filled by reflection when the region is cut, is never edited, and is dropped when it is put back.
    """

    left: int
    top: int
    side: int
    width: int
    height: int

    def cut(self, picture: Tensor, size: int) -> Tensor:
        """[B, C, height, width] → the region as [B, C, size, size]. Exact where ``side == size``."""
        rows = _reflected(self.top, self.side, self.height).to(picture.device)
        columns = _reflected(self.left, self.side, self.width).to(picture.device)
        return resize(picture.index_select(2, rows).index_select(3, columns), size)

    def cut_mask(self, mask: Tensor, size: int, soft: bool = False) -> Tensor:
        """[B, 1, height, width] → [B, 1, size, size]; 0 beyond the picture's edges.

        A binary mask stays binary. Where it is so small or thin that nothing of it would be left at the model's size (an
        island, a line; or more than half of it all), every pixel it touches is taken.
        """
        inner = self.inner()
        canvas = mask.new_zeros(mask.shape[0], 1, self.side, self.side)
        canvas[:, :, inner.top - self.top : inner.bottom - self.top, inner.left - self.left : inner.right - self.left] = mask[
            :, :, inner.top : inner.bottom, inner.left : inner.right
        ]
        if self.side == size:
            small = canvas
        elif self.side > size:
            small = F.interpolate(canvas, size=(size, size), mode="area")
        else:
            small = F.interpolate(canvas, size=(size, size), mode="bilinear", align_corners=False)
        if soft:
            return small.clamp(0, 1)
        half = (small >= THRESHOLD).to(mask.dtype)
        touched = (small > 0).to(mask.dtype)
        thin = half.sum(dim=(1, 2, 3), keepdim=True) < 0.5 * small.sum(dim=(1, 2, 3), keepdim=True)
        # A pixel is lost if nothing near it stands for it; enlarging spreads a mask's edge over size/side pixels.
        reach = max(1, math.ceil(size / self.side))
        lost = touched * (1 - F.max_pool2d(half, 2 * reach + 1, 1, reach))
        return torch.where(thin, touched, torch.maximum(half, lost))

    def put_back(self, edited: Tensor, picture: Tensor) -> Tensor:
        """The picture with the region replaced, [B, C, height, width]; ``edited`` is [B, C, size, size] in its values."""
        inner = self.inner()
        full = resize(edited, self.side)
        out = picture.expand(edited.shape[0], -1, -1, -1).clone()
        out[:, :, inner.top : inner.bottom, inner.left : inner.right] = full[
            :, :, inner.top - self.top : inner.bottom - self.top, inner.left - self.left : inner.right - self.left
        ]
        return out

    def within(self, box: Box) -> Region:
        """The same square, of the part of the picture in a box."""
        return Region(self.left - box.left, self.top - box.top, self.side, box.right - box.left, box.bottom - box.top)

    def inner(self) -> Box:
        """The part of the region that lies in the picture."""
        return Box(max(self.left, 0), max(self.top, 0), min(self.left + self.side, self.width), min(self.top + self.side, self.height))


@dataclass(frozen=True)
class Box:
    """A rectangle in whole pixels, right and bottom exclusive."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def slices(self) -> tuple[slice, slice, slice, slice]:
        """To index pictures [B, C, H, W] with."""
        return slice(None), slice(None), slice(self.top, self.bottom), slice(self.left, self.right)

    def grown(self, by: int, width: int, height: int) -> Box:
        """Larger by so many pixels on every side, within a picture of that size."""
        return Box(max(self.left - by, 0), max(self.top - by, 0), min(self.right + by, width), min(self.bottom + by, height))


def bounds(mask: Tensor, soft: bool = False) -> Box:
    """The smallest box around what is edited, of a mask [.., H, W]; BlendedError if that is nothing."""
    flat = mask.reshape(-1, *mask.shape[-2:])
    inside = ((flat > 0) if soft else (flat >= THRESHOLD)).any(0)
    rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
    if not len(rows):
        peak = float(mask.nan_to_num(0.0).max()) if mask.numel() else 0.0
        rule = "above 0" if soft else "0.5 or more (grey 128 of 255)"
        raise BlendedError(
            f"the mask is empty: its brightest pixel is {peak:.3g} and editing needs {rule}. Paint white where the picture should "
            "change; if black was meant, use --invert-mask."
        )
    return Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def region_around(mask: Tensor, model_size: int, context: float = 1.6, soft: bool = False) -> Region:
    """The square that an edit works on.

    Args:
        mask: [.., H, W], 1 = edit; several islands are covered by one square.
        model_size: the model's side in pixels.
        context: side of the square over the longer side of the mask; at least 1. More shows the model more of the
            surroundings, and gives the edit fewer pixels.
        soft: the mask is soft.

    Returns:
        A region inside the picture where it fits. Where the mask is longer than the picture's shorter side, it reaches
        beyond that side.
    """
    if not (math.isfinite(context) and context >= 1):
        raise BlendedError(f"context is {context}; give 1 (the mask alone) or more, 1.6 is usual.")
    height, width = int(mask.shape[-2]), int(mask.shape[-1])
    box = bounds(mask, soft)
    longer = max(box.right - box.left, box.bottom - box.top)
    side = max(math.ceil(longer * context), -(-model_size // SMALLEST))
    side = max(min(side, max(width, height)), longer)
    if side != model_size and 1 / SNAP <= side / model_size <= SNAP and longer * min(context, 1.1) <= model_size <= max(width, height):
        side = model_size
    return Region(
        _place(box.left, box.right, side, width), _place(box.top, box.bottom, side, height), side, width, height
    )  # fmt: skip


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


@dataclass(frozen=True)
class WholePicture:
    """The whole picture squashed to a square, as the reference code does it (Lanczos; the mask by nearest neighbour)."""

    width: int
    height: int

    def cut(self, picture: Tensor, size: int) -> Tensor:
        """[1, 3, height, width] in 0..1 → [1, 3, size, size], through 8 bit as the reference does."""
        from PIL import Image

        pixels = (picture[0].permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        small = Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].to(picture) / 255

    def cut_mask(self, mask: Tensor, size: int, soft: bool = False) -> Tensor:
        """[1, 1, height, width] → [1, 1, size, size]."""
        from PIL import Image

        small = Image.fromarray(mask[0, 0].to(torch.float32).numpy()).resize((size, size), Image.Resampling.NEAREST)
        return torch.from_numpy(np.array(small))[None, None].to(mask)

    def put_back(self, edited: Tensor, picture: Tensor) -> Tensor:
        """Stretched to the picture's size; [B, C, size, size] → [B, C, height, width]."""
        return resize(edited, (self.height, self.width))
