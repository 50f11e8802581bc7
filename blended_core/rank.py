"""Scores of candidates, ranking, and what can be said of a picture's background and seam."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import ViewParameters, draw_views, warp_views
from .clip.model import ClipModel, Prompt
from .guidance import prompt_distance, seen_by_clip
from .mask import THRESHOLD
from .region import bounds


@dataclass(frozen=True)
class Score:
    """Of one candidate.

    Attributes:
        clip_distance: of the masked region to the prompt, as the candidates are ranked; lower is better. None without a prompt.
        gain: the same distance of the source's region minus this one: what the edit won.
        background_error: mean |difference| to the original outside the mask, in 0..1.
        seam_energy: how much more the picture jumps across the mask's edge than beside it, in 0..1.
    """

    clip_distance: float | None
    gain: float | None
    background_error: float
    seam_energy: float

    def to_dict(self) -> dict[str, float | None]:
        """Plain values."""
        return asdict(self)


@torch.no_grad()
def clip_distance(pictures: Tensor, mask: Tensor, clip: ClipModel, prompt: Prompt, distance: str = "spherical") -> Tensor:
    """Distance of the masked region as guidance sees it (grey outside, normalised); [B, 3, H, W] in −1..1 → [B]."""
    return prompt_distance(clip.encode_image(seen_by_clip(pictures, mask, clip.image_size)), prompt, distance)


RANKING_VIEWS = 32
"""Views of :func:`clip_distance_of_views`; the first is not warped."""
VIEWS_SEED = 0
VIEWS_AT_ONCE = 8
"""As many as a guided step of the presets, which in addition keeps what it needs on the way back."""


@torch.no_grad()
def clip_distance_of_views(
    pictures: Tensor,
    mask: Tensor,
    clip: ClipModel,
    prompt: Prompt,
    distance: str = "spherical",
    views: int = RANKING_VIEWS,
    at_once: int = VIEWS_AT_ONCE,
) -> Tensor:
    """Mean of :func:`clip_distance` over the picture and warped views of it, the same ones for every picture; [B, 3, H, W] in −1..1 → [B].

    Guidance has pushed each candidate until CLIP is content with the views that it saw, so that one view more of the same kind hardly
    tells a good candidate from an adversarial one; from many others only what is really there looks right. ``at_once``: views of each
    picture that go through CLIP together; changes memory, not the result.
    """
    seen = seen_by_clip(pictures, mask, clip.image_size)
    if views <= 1:
        return prompt_distance(clip.encode_image(seen), prompt, distance)
    parameters = draw_views(torch.Generator().manual_seed(VIEWS_SEED), views - 1, clip.image_size)
    total = prompt_distance(clip.encode_image(seen), prompt, distance)
    # MPS lacks the warp's padding in some versions of torch; these few small pictures are warped as fast on the processor.
    small = seen.cpu() if seen.device.type == "mps" else seen
    for first in range(0, views - 1, at_once):
        some = parameters.rows(first, min(first + at_once, views - 1))
        warped = warp_views(small.repeat(len(some), 1, 1, 1), ViewParameters.interleave([some] * len(small))).to(seen.device)
        total = total + prompt_distance(clip.encode_image(warped), prompt, distance).view(len(some), len(seen)).sum(0)
    return total / views


@torch.no_grad()
def clip_distance_reference(
    pictures: Tensor, mask: Tensor, clip: ClipModel, prompt: Prompt, distance: str = "spherical_unclamped", antialias: bool = True
) -> Tensor:
    """The reference code's ranking score (METHOD row 7): values in 0..1, black outside, no normalisation; → [B]."""
    masked = (pictures + 1).div(2).clamp(0, 1) * mask
    size = (clip.image_size, clip.image_size)
    small = masked if masked.shape[-2:] == size else F.interpolate(masked, size=size, mode="bilinear", antialias=antialias)
    return prompt_distance(clip.encode_normalised(small), prompt, distance)


BAND = 2**18
"""Pixels that are compared at once: their differences fit a processor's cache, where those of a large picture would not."""


def background_error(result: Tensor, original: Tensor, mask: Tensor, soft: bool = False) -> float:
    """Mean |result − original| over the pixels outside the mask; pictures [1, C, H, W], mask [1, 1, H, W]; 0 if there are none."""
    rows = max(1, BAND // result.shape[-1])
    total, count = 0.0, 0
    for parts in zip(*(torch.split(tensor, rows, 2) for tensor in (result, original, mask)), strict=True):
        here, there, area = parts
        outside = ((area <= 0) if soft else (area < THRESHOLD)).expand_as(here)
        total += float(torch.where(outside, (here - there).abs(), 0.0).sum(dtype=torch.float64))
        count += int(outside.sum())
    return total / count if count else 0.0


def seam_energy(result: Tensor, mask: Tensor, soft: bool = False) -> float:
    """Mean jump across the mask's edge beyond the mean jump one pixel further in and out, at least 0; 0 without an edge.

    Pictures [1, C, H, W] in 0..1. Every pair of neighbours of which one is inside counts, along rows and along columns.
    """
    inside = ((mask > 0) if soft else (mask >= THRESHOLD))[0, 0]
    if not inside.any():
        return 0.0
    around = bounds(mask, soft).grown(SEAM_REACH, int(inside.shape[1]), int(inside.shape[0]))
    picture, inside = result[around.slices][0], inside[around.slices[2:]]
    total, count = 0.0, 0
    for colours, within in ((picture, inside), (picture.transpose(1, 2), inside.T)):
        if within.shape[1] < 4:
            continue
        jumps = (colours[:, :, 1:] - colours[:, :, :-1]).abs().double().mean(0)  # [H, W−1]
        edge = (within[:, 1:] != within[:, :-1])[:, 1:-1]
        beside = 0.5 * (jumps[:, :-2] + jumps[:, 2:])
        total += float((jumps[:, 1:-1] - beside)[edge].sum())
        count += int(edge.sum())
    return max(0.0, total / count) if count else 0.0


SEAM_REACH = 3
"""Pixels around the mask that its seam is measured in."""
RANKINGS = {"views": clip_distance_of_views, "corrected": clip_distance, "reference": clip_distance_reference}
"""What :attr:`~blended_core.edit.EditOptions.ranking` names."""


def ranking(distances: Sequence[float | None]) -> list[int]:
    """Indices from best to worst; those without a distance last. Equal ones keep their order."""
    return sorted(range(len(distances)), key=lambda i: math.inf if (d := distances[i]) is None or math.isnan(d) else d)
