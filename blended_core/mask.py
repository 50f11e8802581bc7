"""Masks, blending at matching noise levels, and the final paste."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

THRESHOLD = 0.5
SOFT_FADE = 0.25
"""Soft masks: below this value the paste fades the edit out, so that a mask's thin skirt leaves no rim."""


def binary_mask(mask: Tensor, invert: bool = False) -> Tensor:
    """1 where ``mask`` is at least 0.5, else 0; the other way round if ``invert``. NaN is never edited."""
    return ((mask < THRESHOLD) if invert else (mask >= THRESHOLD)).to(torch.float32)


def soft_mask(mask: Tensor, invert: bool = False) -> Tensor:
    """``mask`` clamped to 0..1; 1 − mask if ``invert``. NaN becomes 0 in both cases: it is never edited."""
    values = mask.to(torch.float32).clamp(0, 1)
    return (1 - values if invert else values).nan_to_num(0.0)


def mask_at_level(mask: Tensor, index: int, start_index: int, soft: bool) -> Tensor:
    """The mask that one level is blended with.

    A soft mask becomes {m > threshold}, and the threshold rises with the noise level from 0 at the cleanest index to just
    under 1 at ``start_index``: a pixel of 1 is free all the way, one of 0 never is, and one between is set free as late as
    its value is low, so that it keeps the more of the source. (Levin & Fried, "Differential Diffusion", 2023.)
    """
    if not soft:
        return mask
    return (mask > index / (start_index + 1)).to(mask.dtype)


def mask_for_clip(mask: Tensor, soft: bool) -> Tensor:
    """What CLIP sees of a mask: everything that may be edited at all, however little."""
    return (mask > 0).to(mask) if soft else mask


def blend(foreground: Tensor, background: Tensor, mask: Tensor) -> Tensor:
    """x_fg ⊙ m + x_bg ⊙ (1 − m), [B, C, H, W]; both must be at one noise level."""
    return foreground * mask + background * (1 - mask)


def paste_weights(mask: Tensor, soft: bool, feather: int) -> Tensor:
    """How much of the edit the final paste takes, [.., H, W] in 0..1; exactly 0 outside the mask.

    ``feather``: pixels over which the edit fades in, counted inwards from the mask's edge.
    """
    weights = (mask / SOFT_FADE).clamp(max=1.0) if soft else (mask >= THRESHOLD).to(torch.float32)
    if feather > 0:
        inside = (weights > 0).to(torch.float32)
        window = 2 * feather + 1
        flat = F.pad(inside.reshape(-1, 1, *inside.shape[-2:]), (feather,) * 4, mode="replicate")
        # The share of a window that lies inside is about a half at a straight edge and 1 deeper than ``feather``.
        share = F.avg_pool2d(F.avg_pool2d(flat, (1, window), 1), (window, 1), 1).reshape(inside.shape)
        weights = weights * ((share - 0.5) * 2).clamp(1 / (feather + 1), 1.0) * inside
    return weights


def final_paste(edited: Tensor, original: Tensor, mask: Tensor, *, soft: bool = False, feather: int = 0) -> Tensor:
    """The original with the edit inside the mask.

    Args:
        edited: [B, C, H, W] in the original's own values (0..1); clamped to that range.
        original: [B or 1, C, H, W] in 0..1.
        mask: [B or 1, 1, H, W], 1 = edit.
        soft: the mask is soft: outside is m = 0; else outside is m < 0.5.
        feather: pixels over which the edit fades in, inwards.

    Returns:
        [B, C, H, W] in the original's dtype. Outside the mask the values are the original's bit for bit: they are chosen, never computed, so that
        neither rounding nor a NaN of the edit reaches them.
    """
    weights = paste_weights(mask.nan_to_num(0.0), soft, feather)
    edited = edited.clamp(0, 1)
    mixed = torch.where(weights >= 1, edited, original + (edited - original) * weights)
    return torch.where(weights > 0, mixed.to(original.dtype), original)
