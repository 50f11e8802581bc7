"""Scores of candidates and their order; measures of the background and of the seam of a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .augment import ViewParameters, balanced_views, warp_views
from .clip.model import ClipModel, Prompt
from .losses import Distance, masked_view, prompt_distance, spherical_distance
from .mask import EditMask
from .region import SEAM_MARGIN

RANKING_VIEWS = 32
"""Views of :func:`clip_distance_of_views`; the first is not warped."""
RANKING_VIEWS_AT_ONCE = 8
"""As many as a guided step of the presets, which in addition keeps what the backward pass needs."""
BAND_PIXELS = 2**18
"""Pixels that are compared at once: their differences fit into the cache of a processor."""


@dataclass(frozen=True)
class Score:
    """The score of one candidate.

    Attributes:
        clip_distance: of the masked region to the prompt, by which the candidates are ranked; lower is better. None without a prompt.
        gain: the same distance of the source's region minus this one.
        background_error: mean |difference| to the original outside the mask, in 0..1; None if no pixel is outside.
        seam_energy: how much more the picture changes across the edge of the mask than beside it, in 0..1.
        background_pixels: number of pixels outside the mask, which the background error is about.
    """

    clip_distance: float | None
    gain: float | None
    background_error: float | None
    seam_energy: float
    background_pixels: int = 0

    def to_dict(self) -> dict[str, float | None]:
        """Plain values."""
        return asdict(self)


@torch.no_grad()
def clip_distance(pictures: Tensor, mask: Tensor, clip: ClipModel, prompt: Prompt, distance: Distance = spherical_distance) -> Tensor:
    """Distance of the masked region as guidance sees it (gray outside, normalized); [B, 3, H, W] in −1..1 → [B]."""
    return prompt_distance(clip.encode_image(masked_view(pictures, mask, clip.image_size)), prompt, distance)


@torch.no_grad()
def clip_distance_of_views(
    pictures: Tensor,
    mask: Tensor,
    clip: ClipModel,
    prompt: Prompt,
    distance: Distance = spherical_distance,
    views: int = RANKING_VIEWS,
    at_once: int = RANKING_VIEWS_AT_ONCE,
) -> Tensor:
    """Mean of :func:`clip_distance` over the picture and warped views of it, the same balanced set for every picture; [B, 3, H, W] in −1..1 → [B].

    Guidance optimizes each candidate for the views that it used, so one more view of that kind hardly distinguishes a good candidate from an
    adversarial one. Over many other views only what is really there has a small distance. ``at_once``: views of each picture that go through CLIP
    together; changes memory, not the result.
    """
    view = masked_view(pictures, mask, clip.image_size)
    total = prompt_distance(clip.encode_image(view), prompt, distance)
    if views <= 1:
        return total
    parameters = balanced_views(views - 1, clip.image_size)
    # MPS lacks the padding of the warp in some versions of torch; these few small pictures are warped as fast on the CPU.
    small = view.cpu() if view.device.type == "mps" else view
    for first in range(0, views - 1, at_once):
        some = parameters.rows(first, min(first + at_once, views - 1))
        warped = warp_views(small.repeat(len(some), 1, 1, 1), ViewParameters.interleave([some] * len(small))).to(view.device)
        total = total + prompt_distance(clip.encode_image(warped), prompt, distance).view(len(some), len(view)).sum(0)
    return total / views


def background_error(result: Tensor, original: Tensor, mask: EditMask, pixels: int | None = None) -> float | None:
    """Mean |result − original| over the pixels outside the mask; pictures [1, C, H, W]; None if there are none.

    ``pixels``: number of pixels outside in the whole picture, where a part of it is given that holds all that differs.
    """
    rows = max(1, BAND_PIXELS // result.shape[-1])
    total, count = 0.0, 0
    for changed, kept, inside in zip(*(torch.split(tensor, rows, 2) for tensor in (result, original, mask.inside)), strict=True):
        outside = (~inside).expand_as(changed)
        total += float(torch.where(outside, (changed - kept).abs(), 0.0).sum(dtype=torch.float64))
        count += int(outside.sum())
    count = count if pixels is None else pixels * result.shape[1]
    return total / count if count else None


def seam_energy(result: Tensor, mask: EditMask) -> float:
    """Mean step across the edge of the mask beyond the mean step one pixel further in and out, at least 0; 0 without an edge.

    Picture [1, C, H, W] in 0..1. Every pair of neighbors of which one is inside counts, along rows and along columns.
    """
    inside = mask.inside[0, 0]
    if not inside.any():
        return 0.0
    around = mask.box().grown(SEAM_MARGIN, int(inside.shape[1]), int(inside.shape[0]))
    picture, inside = result[around.slices][0], inside[around.slices[2:]]
    total, count = 0.0, 0
    for colors, within in ((picture, inside), (picture.transpose(1, 2), inside.T)):
        if within.shape[1] < 4:
            continue
        steps = (colors[:, :, 1:] - colors[:, :, :-1]).abs().double().mean(0)  # [H, W−1]
        edge = (within[:, 1:] != within[:, :-1])[:, 1:-1]
        beside = 0.5 * (steps[:, :-2] + steps[:, 2:])
        total += float((steps[:, 1:-1] - beside)[edge].sum())
        count += int(edge.sum())
    return max(0.0, total / count) if count else 0.0


def ranking(distances: Sequence[float | None]) -> list[int]:
    """Indices from best to worst; those without a distance last. Equal ones keep their order."""
    return sorted(range(len(distances)), key=lambda i: math.inf if (d := distances[i]) is None or math.isnan(d) else d)
