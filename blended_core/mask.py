"""The mask of an edit, blending at matching noise levels, and the final paste."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import BlendedError, Note

THRESHOLD = 0.5
NEAR_BLACK = 8.5 / 255
"""Values of a soft mask below this (8 of 255 and less) are outside: compression noise or the tail of a sigmoid, not a part to edit."""
EMPTY = {
    "binary": ("0.5 or more (gray 128 of 255)", "less than 0.5 (gray 127 of 255)"),
    "soft": ("above 0.033 (gray 8 of 255)", "below 0.967 (gray 247 of 255)"),
    "nonzero": ("more than 0", "0"),
}
"""Rule → what a pixel needs to be inside the mask, and inside the inverted mask."""
SOFT_FADE = 0.25
"""Below this value of a soft mask the paste fades the edit out, so that faint values at the edge of a mask leave no visible rim."""


@dataclass(frozen=True)
class Box:
    """A rectangle in whole pixels, right and bottom exclusive."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def slices(self) -> tuple[slice, slice, slice, slice]:
        """The index of the box in a picture [B, C, H, W]."""
        return slice(None), slice(None), slice(self.top, self.bottom), slice(self.left, self.right)

    def grown(self, by: int, width: int, height: int) -> Box:
        """Larger by ``by`` pixels on every side, limited to a picture of that size."""
        return Box(max(self.left - by, 0), max(self.top - by, 0), min(self.right + by, width), min(self.bottom + by, height))


@dataclass(frozen=True, eq=False, repr=False)
class EditMask:
    """Which pixels an edit may change.

    Attributes:
        values: [B, 1, H, W] float32 in 0..1; 0 is outside. Of a binary mask every value is 0 or 1.
        soft: whether values between 0 and 1 matter: a pixel is released the later, the lower its value.
        empty: the error if nothing is inside, with the peak of the mask that these values were made from.
        near_black: share of the pixels that are nearly black and not 0. In a soft mask they are outside.
    """

    values: Tensor
    soft: bool = False
    empty: str = "the mask is empty."
    near_black: float = 0.0

    @classmethod
    def of(cls, mask: Tensor, rule: str = "binary", invert: bool = False) -> EditMask:
        """The mask that an edit uses.

        Args:
            mask: [B, 1, H, W] in 0..1, 1 = edit. NaN is never edited.
            rule: 'binary' (at least 0.5), 'soft' (above :data:`NEAR_BLACK`), or 'nonzero' (above 0, as in the reference code).
            invert: edit the outside instead.
        """
        empty = _empty(mask, rule, invert)
        if rule == "binary":
            inside = mask >= THRESHOLD
            return cls(((~inside & ~mask.isnan()) if invert else inside).to(torch.float32), False, empty)
        values = mask.to(torch.float32).clamp(0, 1)
        if rule == "nonzero":
            inside = mask > 0
            near = inside & (values < NEAR_BLACK)
            return cls(((~inside & ~mask.isnan()) if invert else inside).to(torch.float32), False, empty, float(near.float().mean()))
        values = (1 - values if invert else values).nan_to_num(0.0)
        near = (values > 0) & (values < NEAR_BLACK)
        return cls(values.masked_fill(near, 0.0), True, empty, float(near.float().mean()))

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        height, width = self.values.shape[-2:]
        return f"EditMask({len(self)} of {width}×{height}, {'soft' if self.soft else 'binary'}, {float(self.inside.float().mean()):.1%} inside)"

    @property
    def inside(self) -> Tensor:
        """The pixels that may change, bool [B, 1, H, W]."""
        return self.values > 0

    @property
    def outside_pixels(self) -> int:
        """Number of pixels that an edit may not change."""
        return self.values.numel() - int(self.inside.count_nonzero())  # a sum would copy the mask as int64

    @property
    def notes(self) -> list[Note]:
        """What the user should know about the mask, for a run's notes."""
        if not self.near_black:
            return []
        treated = "they count as outside" if self.soft else "the rule nonzero counts them as inside"
        return [Note(f"{self.near_black:.2%} of the mask is nearly black (1 to 8 of 255); {treated}.", option="mask_rule")]

    def intersected(self, other: EditMask) -> EditMask:
        """What lies inside both masks; of soft masks the lower value."""
        return replace(self, values=torch.minimum(self.values, other.values), soft=self.soft or other.soft)

    def rows(self, rows: Sequence[int] | slice) -> EditMask:
        """The masks of some images; a single one is the mask of all."""
        if len(self) == 1:
            return self
        return replace(self, values=self.values[rows if isinstance(rows, slice) else list(rows)])

    def part(self, box: Box) -> EditMask:
        """The masks of a part of the picture; nothing is copied."""
        return self.with_values(self.values[box.slices])

    def with_values(self, values: Tensor) -> EditMask:
        """A mask of the same kind with other values: cut, moved to a device."""
        return replace(self, values=values)

    def at_level(self, index: int, start_index: int) -> Tensor:
        """The weights [B, 1, H, W] that one level is blended with.

        A soft mask becomes {m > threshold}. The threshold rises with the noise level, from 0 at the cleanest index to just below 1 at
        ``start_index``: a pixel of 1 is free at every level, one of 0 at none, and one between is released the later, the lower its value, so that it
        keeps more of the source. (Levin & Fried, "Differential Diffusion", 2023.) A binary mask is the same at every level.
        """
        return (self.values > index / (start_index + 1)).to(self.values)

    def for_clip(self) -> Tensor:
        """What CLIP sees [B, 1, H, W]: every pixel that may change at all."""
        return self.inside.to(self.values)

    def box(self) -> Box:
        """The smallest box around everything inside, over all images.

        Raises:
            BlendedError: if nothing is inside.
        """
        inside = self.inside.flatten(0, 1).any(0)
        rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
        if not len(rows):
            raise BlendedError(self.empty, option="invert_mask")
        return Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)

    def paste_weights(self, feather: int = 0) -> Tensor:
        """Share of the edit in the final paste, [B, 1, H, W] in 0..1; exactly 0 outside.

        ``feather``: pixels over which the edit fades in, counted inward from the edge of the mask: a pixel at a distance of d pixels from the nearest
        one outside has the share d / feather, at most 1. The edge of the picture is no edge of the mask.
        """
        weights = (self.values / SOFT_FADE).clamp(max=1.0)
        if feather > 0:
            weights = weights * (distance_inward(self.inside, feather) / feather)
        return weights


def _empty(mask: Tensor, rule: str, invert: bool) -> str:
    """:attr:`EditMask.empty` for the arguments of :meth:`EditMask.of`."""
    peak = (float(mask.nan_to_num(1.0).min()) if invert else float(mask.nan_to_num(0.0).max())) if mask.numel() else 0.0
    if invert:
        return (
            f"the inverted mask is empty: the darkest pixel of the mask is {peak:.3g} and editing needs {EMPTY[rule][1]}. Paint black where the "
            "picture should change, or do not invert the mask."
        )
    return (
        f"the mask is empty: its brightest pixel is {peak:.3g} and editing needs {EMPTY[rule][0]}. Paint white where the picture should change, "
        "or invert the mask if black was meant."
    )


def from_labels(mask: Tensor) -> Tensor | None:
    """A mask whose only values are 0 and 1/255 with 1 in place of 1/255: tools for segmentation write 0 and 1 in 8 bits. None for any other mask."""
    highest = float(mask.nan_to_num(0.0).max()) if mask.numel() else 0.0
    if not 0.5 < highest * 255 < 1.5:
        return None
    return (mask > 0.5 * highest).to(mask.dtype)


def distance_inward(inside: Tensor, limit: int) -> Tensor:
    """Euclidean distance of every pixel inside to the nearest pixel outside, in pixels, at most ``limit``; 0 outside.

    Exact and separable: first along columns, then the lower envelope along rows (Felzenszwalb & Huttenlocher, "Distance Transforms of Sampled
    Functions", 2012), which needs no more than ``limit`` neighbors.

    Args:
        inside: [B, 1, H, W] bool.
        limit: in whole pixels, at least 1.

    Returns:
        [B, 1, H, W] float32.
    """
    height, width = inside.shape[-2:]
    row = torch.arange(height, dtype=torch.int32, device=inside.device).view(-1, 1).expand(inside.shape)
    above = row.masked_fill(inside, -limit - 1).cummax(2).values
    below = row.masked_fill(inside, height + limit).flip(2).cummin(2).values.flip(2)
    along_column = torch.minimum(row - above, below - row).clamp(max=limit).float().square()
    nearest = along_column.clone()
    for shift in range(1, min(limit, width - 1) + 1):
        if shift**2 >= float(nearest.max()):
            break
        for to, of in ((slice(shift, None), slice(None, -shift)), (slice(None, -shift), slice(shift, None))):
            nearest[..., to] = torch.minimum(nearest[..., to], along_column[..., of] + shift**2)
    return nearest.sqrt()


def dilated(values: Tensor, by: int) -> Tensor:
    """A mask grown by a square of 2·by + 1 pixels, over its last two axes; of gray values the largest. [..., H, W] → the same shape."""
    if by <= 0:
        return values
    flat = values.reshape(1, -1, *values.shape[-2:])
    # One axis after the other: a square is a run of rows and a run of columns.
    flat = F.max_pool2d(F.max_pool2d(flat, (2 * by + 1, 1), 1, (by, 0)), (1, 2 * by + 1), 1, (0, by))
    return flat.reshape(values.shape)


def blend(foreground: Tensor, background: Tensor, mask: Tensor) -> Tensor:
    """x_fg ⊙ m + x_bg ⊙ (1 − m), [B, C, H, W]; both must be at one noise level. (Algorithm 2.)"""
    return foreground * mask + background * (1 - mask)


def final_paste(edited: Tensor, original: Tensor, mask: EditMask, feather: int = 0) -> Tensor:
    """The original with the edit inside the mask.

    Args:
        edited: [B, C, H, W] in the original's own values (0..1); clamped to that range.
        original: [B or 1, C, H, W] in 0..1.
        mask: [B or 1, 1, H, W].
        feather: pixels over which the edit fades in, inward.

    Returns:
        [B, C, H, W] in the original's dtype. Outside the mask the values are the original's bit for bit: they are selected, not computed, so neither
        rounding nor a NaN of the edit reaches them.
    """
    weights = mask.paste_weights(feather)
    edited = edited.clamp(0, 1)
    mixed = torch.where(weights >= 1, edited, original + (edited - original) * weights)
    return torch.where(weights > 0, mixed.to(original.dtype), original)
