"""Distances and losses of guidance. Every loss is one number per image, so that no image's gradient sees its neighbours."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import BlendedError

DISTANCES = ("spherical", "spherical_unclamped", "cosine")

PerceptualDistance = Callable[[Tensor, Tensor], Tensor]
"""Two pictures [B, 3, H, W] in −1..1 → a distance for each, [B]."""


def d_clip(image: Tensor, text: Tensor, distance: str = "spherical") -> Tensor:
    """Distance of embeddings, [N, D] against [D] or [N, D] → [N]; neither needs to be normalised.

    'spherical': squared great-circle distance 2·arcsin²(‖a − b‖/2), from 0 to π²/2, kept differentiable at opposite
    points by clamping the arcsine's argument. 'spherical_unclamped': without the clamp, as the reference has it.
    'cosine': 1 − cos, from 0 to 2.
    """
    a, b = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    if distance == "cosine":
        return 1 - (a * b).sum(-1)
    if distance not in DISTANCES:
        raise BlendedError(f"unknown CLIP distance {distance!r}; known are {', '.join(DISTANCES)}.")
    half = (a - b).norm(dim=-1) / 2
    if distance == "spherical":
        half = half.clamp(max=1 - 1e-6)
    squared: Tensor = half.arcsin().square()
    return 2 * squared


def range_loss(x0: Tensor) -> Tensor:
    """Mean squared excess of x̂0 over −1..1; [B, C, H, W] → [B]."""
    return (x0 - x0.clamp(-1, 1)).square().mean(dim=(1, 2, 3))


def d_background(x: Tensor, source: Tensor, mask: Tensor, perceptual: PerceptualDistance) -> Tensor:
    """½ (MSE + LPIPS) of what lies outside the mask, both pictures masked alike; → [B]. (Paper, eq. 6.)"""
    outside = 1 - mask
    a, b = x * outside, (source * outside).expand_as(x)
    return 0.5 * ((a - b).square().mean(dim=(1, 2, 3)) + perceptual(a, b))


def d_background_reference(
    x: Tensor, source: Tensor, mask: Tensor, perceptual: PerceptualDistance, lpips_scale: float, l2_scale: float
) -> Tensor:
    """The reference code's background loss, already weighted (METHOD row 6); → one number for the whole batch.

    Only the prediction is masked, and the MSE averages over the batch, so images influence one another.
    """
    background = x * (1 - mask)
    whole = source.expand_as(x)
    return lpips_scale * perceptual(background, whole).sum() + l2_scale * F.mse_loss(background, whole)


def finite_rows(gradient: Tensor) -> tuple[Tensor, int]:
    """A gradient in which every image with a NaN or infinity is zero, and how many there were."""
    good = gradient.isfinite().flatten(1).all(1)
    if bool(good.all()):
        return gradient, 0
    keep = good.view(-1, *[1] * (gradient.ndim - 1))
    return torch.where(keep, gradient, torch.zeros_like(gradient)), int((~good).sum())


def clamp_rows(gradient: Tensor, limit: float) -> Tensor:
    """Scales down every image's gradient whose root mean square exceeds ``limit``."""
    rms = gradient.flatten(1).square().mean(1).sqrt().clamp(min=1e-20)
    factor = (limit / rms).clamp(max=1.0)
    return gradient * factor.view(-1, *[1] * (gradient.ndim - 1))
