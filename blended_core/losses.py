"""The losses of guidance. Each maps an image to a value and a gradient per image, so that no image's gradient depends on its neighbors.

A loss is any object with a ``name`` that is called as ``loss(image, step)`` and returns a :class:`LossTerm`; :func:`differentiate` makes one from a
differentiable function. Sources: Avrahami et al. (CVPR 2022), equations 4 to 6; Dhariwal & Nichol (2021) for gradients as guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import ViewParameters, warp_views
from .clip.model import ClipModel, Prompt
from .device import gradient_through, pull_back, upload
from .errors import BlendedError
from .random import RandomSource
from .schedule import Schedule

Distance = Callable[[Tensor, Tensor], Tensor]
"""Embeddings [N, D] and [D] or [N, D] → [N]."""

PerceptualDistance = Callable[[Tensor, Tensor], Tensor]
"""Two pictures [B, 3, H, W] in −1..1 → a distance for each, [B]."""


@dataclass(frozen=True, eq=False, repr=False)
class StepInput:
    """What a step starts from.

    Attributes:
        x: the noisy batch [B, C, H, W]; index: its level in the schedule.
        schedule: None where a sampler of another program takes the steps (:mod:`~blended_core.shift`); ``index`` then counts its calls.
        images: number of the candidate in each row; random: the source of their random numbers.
        mask: [B or 1, 1, H, W], 1 = the part that CLIP sees.
        source: the source image [B or 1, C, H, W] in −1..1, or None.
    """

    x: Tensor
    index: int
    schedule: Schedule | None
    images: Sequence[int]
    random: RandomSource
    mask: Tensor
    source: Tensor | None = None

    @property
    def levels(self) -> Schedule:
        """The schedule. Raises BlendedError where there is none."""
        if self.schedule is None:
            raise BlendedError(
                "clip_input 'mixed' needs the noise schedule of a pixel-space diffusion model, and here another sampler takes the steps; use "
                "clip_input 'x0'.",
                option="clip_input",
            )
        return self.schedule

    def __repr__(self) -> str:
        where = f"call {self.index}" if self.schedule is None else f"level {self.index} of {len(self.schedule)}"
        return f"StepInput({where}, candidates {list(self.images)}, {tuple(self.x.shape)})"


class LossTerm(NamedTuple):
    """A loss of a batch.

    Attributes:
        value: per image [B], before the weight of the loss.
        gradient: of the weighted loss with respect to the image that the loss was given [B, C, H, W].
        direct: of the weighted loss with respect to x_t, past the network; None where there is none.
    """

    value: Tensor
    gradient: Tensor
    direct: Tensor | None = None

    def __repr__(self) -> str:
        return f"LossTerm(mean value {float(self.value.mean()):.4g}, gradient {tuple(self.gradient.shape)})"


class Loss(Protocol):
    """A loss of guidance."""

    @property
    def name(self) -> str:
        """Under which its value is reported."""
        ...

    def __call__(self, image: Tensor, step: StepInput) -> LossTerm:
        """The loss of an image [B, 3, H, W], nominally −1..1, which is x̂0 decoded to pixels."""
        ...


def differentiate(function: Callable[[Tensor], Tensor], image: Tensor, scale: float = 1.0) -> LossTerm:
    """A loss term from a differentiable function, image [B, C, H, W] → value of each image [B]; the gradient is that of scale · value."""
    with torch.enable_grad():
        leaf = image.detach().requires_grad_()
        value = function(leaf)
        (gradient,) = torch.autograd.grad((scale * value).sum(), leaf)
    return LossTerm(value.detach(), gradient)


def spherical_distance(image: Tensor, text: Tensor) -> Tensor:
    """Squared great-circle distance 2·arcsin²(‖a − b‖/2), from 0 to π²/2; neither embedding needs to be normalized.

    Clamping the argument of the arcsine keeps it differentiable at opposite points.
    """
    a, b = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    squared: Tensor = ((a - b).norm(dim=-1) / 2).clamp(max=1 - 1e-6).arcsin().square()
    return 2 * squared


def cosine_distance(image: Tensor, text: Tensor) -> Tensor:
    """1 − cos, from 0 to 2; neither embedding needs to be normalized. (Paper, eq. 4.)"""
    return 1 - (F.normalize(image, dim=-1) * F.normalize(text, dim=-1)).sum(-1)


def prompt_distance(embeddings: Tensor, prompt: Prompt, distance: Distance = spherical_distance) -> Tensor:
    """Weighted sum of the distances to all texts of a prompt; [N, D] → [N]."""
    total = torch.zeros(len(embeddings), device=embeddings.device)
    for text, weight in zip(upload(prompt.embeddings, embeddings.device, embeddings.dtype), prompt.weights, strict=True):
        total = total + weight * distance(embeddings, text)
    return total


def masked_view(image: Tensor, mask: Tensor, clip_size: int) -> Tensor:
    """The masked picture, gray (0) outside, average-pooled to CLIP's size; [B, 3, H, W] → [B, 3, S, S]."""
    return F.adaptive_avg_pool2d(image * mask, (clip_size, clip_size))


def range_loss(image: Tensor) -> Tensor:
    """Mean squared excess over −1..1; [B, C, H, W] → [B]."""
    return (image - image.clamp(-1, 1)).square().mean(dim=(1, 2, 3))


def background_loss(image: Tensor, source: Tensor, mask: Tensor, perceptual: PerceptualDistance) -> Tensor:
    """½ (MSE + LPIPS) of the part outside the mask, both pictures masked alike; → [B]. (Paper, eq. 6.)"""
    outside = 1 - mask
    a, b = image * outside, (source * outside).expand_as(image)
    return 0.5 * ((a - b).square().mean(dim=(1, 2, 3)) + perceptual(a, b))


@dataclass(frozen=True, eq=False)
class ClipLoss:
    """Mean CLIP distance to the prompt over augmented views of the masked image (paper, eq. 4 and §4.3).

    Attributes:
        clip, prompt: the distance to what is measured. scale: weight of the loss.
        views: number of views; the first is not warped, so 1 turns the augmentations off.
        chunk: views that go through CLIP at once, 0: all; changes memory, not the result.
        distance: of embeddings. symmetric_views: shift views along both axes.
    """

    clip: ClipModel
    prompt: Prompt
    scale: float = 1000.0
    views: int = 8
    chunk: int = 0
    distance: Distance = spherical_distance
    symmetric_views: bool = True
    name: str = "clip"

    def __call__(self, image: Tensor, step: StepInput) -> LossTerm:
        """The value is the unweighted distance."""
        size = self.clip.image_size
        warps = step.random.views(step.index, step.images, self.views - 1, size, self.symmetric_views) if self.views > 1 else None
        with torch.enable_grad():
            leaf = image.detach().requires_grad_()
            pooled = masked_view(leaf, step.mask, size)
            cotangent, distances = self.pooled_gradient(pooled, warps)
        gradient = pull_back(pooled, leaf, cotangent)
        return LossTerm(distances, gradient)

    def pooled_gradient(self, pooled: Tensor, warps: ViewParameters | None) -> tuple[Tensor, Tensor]:
        """The gradient of scale · mean distance over the views, accumulated chunk by chunk.

        Args:
            pooled: [B, 3, S, S] in −1..1, the view that is not warped.
            warps: of the (views − 1)·B warped rows; None for one view.

        Returns:
            (gradient with respect to ``pooled``, mean distance of each image [B]).
        """
        chunk = self.chunk or self.views
        leaf = pooled.detach().requires_grad_()
        gradient, distances = torch.zeros_like(leaf), torch.zeros(len(pooled), device=pooled.device)
        for start in range(0, self.views, chunk):
            # In a method of its own, so that nothing of a chunk is alive while the next one is computed.
            part, distance = self._chunk_gradient(leaf, start, min(start + chunk, self.views), warps)
            gradient += part.mul_(self.scale / self.views)
            distances += distance / self.views
            del part
        return gradient, distances

    def _chunk_gradient(self, leaf: Tensor, start: int, stop: int, warps: ViewParameters | None) -> tuple[Tensor, Tensor]:
        """Gradient [B, 3, S, S] and sum [B] of the distances of the views from ``start`` up to ``stop``; view 0 is not warped."""
        batch = len(leaf)

        def warped_views() -> Tensor:
            rows = leaf.repeat(stop - start, 1, 1, 1)
            if warps is None:
                return rows
            if start > 0:
                return warp_views(rows, warps.rows((start - 1) * batch, (stop - 1) * batch))
            return torch.cat([rows[:batch], warp_views(rows[batch:], warps.rows(0, (stop - 1) * batch))]) if stop > 1 else rows

        with torch.no_grad():
            views = warped_views().requires_grad_()
        with torch.enable_grad():
            embeddings = self.clip.encode_image(views)
            leaf_of_network = embeddings.detach().requires_grad_()
            distance = prompt_distance(leaf_of_network, self.prompt, self.distance)
            (cotangent,) = torch.autograd.grad(distance.sum(), leaf_of_network)
            cotangent = gradient_through(embeddings, views, cotangent)
        distance = distance.detach().view(stop - start, batch).sum(0)
        # The views are warped a second time for their own backward pass, which is cheap, so they take no memory while CLIP needs it.
        del views
        with torch.enable_grad():
            views = warped_views()
        return pull_back(views, leaf, cotangent), distance


@dataclass(frozen=True)
class RangeLoss:
    """Mean squared excess of the image over −1..1."""

    scale: float = 50.0
    name: str = "range"

    def __call__(self, image: Tensor, step: StepInput) -> LossTerm:
        """The value is the unweighted loss."""
        return differentiate(range_loss, image, self.scale)


@dataclass(frozen=True, eq=False)
class BackgroundLoss:
    """½ (MSE + LPIPS) to the source outside the mask, weighted by λ (paper, eq. 6)."""

    perceptual: PerceptualDistance
    scale: float = 1000.0
    name: str = "background"

    def __call__(self, image: Tensor, step: StepInput) -> LossTerm:
        """The value is the unweighted loss. Raises BlendedError if the step has no source."""
        source = required_source(step)
        return differentiate(lambda leaf: background_loss(leaf, source, step.mask, self.perceptual), image, self.scale)


def required_source(step: StepInput) -> Tensor:
    """The source of a step that a background loss needs; BlendedError without one."""
    if step.source is None:
        raise BlendedError("the background loss needs the source picture; give source.")
    return step.source
