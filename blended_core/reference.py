"""Every deviation of the authors' published code from their paper that the preset ``official`` reproduces (docs/method.md).

The rest of the library follows the paper; it calls this module only where an option asks for one of these deviations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .augment import ViewParameters
from .clip.model import ClipModel, Prompt
from .denoiser import DiffusionModel
from .errors import BlendedError
from .guidance import Guidance, GuidedPrediction
from .losses import Distance, Loss, LossTerm, PerceptualDistance, StepInput, differentiate, prompt_distance, required_source
from .mask import Box, EditMask
from .random import RandomSource
from .region import resize
from .schedule import Schedule


def unclamped_distance(image: Tensor, text: Tensor) -> Tensor:
    """The spherical distance without the clamp that keeps it differentiable at opposite points."""
    a, b = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    squared: Tensor = ((a - b).norm(dim=-1) / 2).arcsin().square()
    return 2 * squared


# --- what CLIP and the losses see (rows 3 and 6) ----------------------------------------------------------------------


def mixed_estimate(x0: Tensor, x_t: Tensor, index: int, schedule: Schedule) -> Tensor:
    """x̂0·f + x_t·(1−f) with f = √(1−ᾱ): what CLIP sees in the reference code (row 3)."""
    share = float(schedule.sqrt_one_minus_alphas_cumprod[index])
    return x0 * share + x_t * (1 - share)


@dataclass(frozen=True, eq=False)
class MixedInput:
    """A loss that sees :func:`mixed_estimate` instead of x̂0, so that a part of its gradient reaches x_t past the network."""

    loss: Loss

    @property
    def name(self) -> str:
        """That of the loss."""
        return self.loss.name

    def __call__(self, image: Tensor, step: StepInput) -> LossTerm:
        """The loss of the mixed image."""
        term = self.loss(mixed_estimate(image, step.x.detach(), step.index, step.levels), step)
        share = float(step.levels.sqrt_one_minus_alphas_cumprod[step.index])
        return LossTerm(term.value, term.gradient * share, term.gradient * (1 - share))


def batch_background_loss(
    image: Tensor, source: Tensor, mask: Tensor, perceptual: PerceptualDistance, lpips_scale: float, l2_scale: float
) -> Tensor:
    """The reference code's background loss, already weighted (row 6); → one number for the whole batch.

    Only the prediction is masked, and the MSE averages over the batch, so the gradient of one image depends on the others.
    """
    background = image * (1 - mask)
    whole = source.expand_as(image)
    return lpips_scale * perceptual(background, whole).sum() + l2_scale * F.mse_loss(background, whole)


@dataclass(frozen=True, eq=False)
class BatchBackgroundLoss:
    """:func:`batch_background_loss` as a loss of guidance; its value is the same for every image."""

    perceptual: PerceptualDistance
    lpips_scale: float
    l2_scale: float
    name: str = "background"

    def __call__(self, image: Tensor, step: StepInput) -> LossTerm:
        """The value is the weighted loss of the batch. Raises BlendedError if the step has no source."""
        source = required_source(step)

        def loss(leaf: Tensor) -> Tensor:
            return batch_background_loss(leaf, source, step.mask, self.perceptual, self.lpips_scale, self.l2_scale)[None]

        term = differentiate(loss, image)
        return term._replace(value=term.value.expand(len(image)))


# --- levels and noise (rows 9 to 12) ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deviations:
    """How the loop deviates from Algorithm 2. The default is Algorithm 2 itself.

    Attributes:
        one_off_level: noise the background to the level of x_t instead of x_{t−1}.
        shared_noise: one background noise for all candidates.
        index_lookup: compute guidance at the index that :func:`reference_index` finds.
    """

    one_off_level: bool = False
    shared_noise: bool = False
    index_lookup: bool = False

    def background_index(self, index: int) -> int:
        """The level of the background that the step from ``index`` is blended with."""
        return index if self.one_off_level else index - 1

    def background_images(self, images: Sequence[int]) -> Sequence[int]:
        """The candidates whose noise the background gets."""
        return [0] if self.shared_noise else images

    def predict(self, guidance: Guidance, model: DiffusionModel, step: StepInput, labels: Tensor | None) -> GuidedPrediction:
        """A guided prediction; where the looked-up index is another one, only its gradient comes from there."""
        found = reference_index(step.index, step.levels) if self.index_lookup else step.index
        if found == step.index:
            return guidance(model, step, labels)
        guided = guidance(model, replace(step, index=found, random=_AtLevel(step.random, step.index)), labels)
        with torch.no_grad():
            return replace(guided, prediction=model.predict(step.x, step.index, step.levels, labels))


def reference_index(index: int, schedule: Schedule) -> int:
    """The index that the reference code recovers from a timestep: exact for even respacing only (row 12).

    Its constant of 1000 is the length of the processes that it was written for.

    Raises:
        BlendedError: where the result lies outside of a schedule.
    """
    timestep = torch.tensor(schedule.model_timestep(index), dtype=torch.float32)
    found = int((timestep * (len(schedule) / 1000)).long())
    if not 0 <= found < len(schedule):
        raise BlendedError(
            f"the index look-up of the reference code gives index {found} of {len(schedule)} for timestep {float(timestep):g}: it was written for "
            "processes of 1000 steps. Use index_lookup 'exact' (any preset but official).",
            option="preset",
        )
    return found


@dataclass(frozen=True)
class _AtLevel:
    """Random numbers named by one level, whatever level is asked for."""

    random: RandomSource
    level: int

    def noise(self, purpose: str, level: int, images: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        return self.random.noise(purpose, self.level, images, shape)

    def labels(self, level: int, images: Sequence[int], classes: int) -> Tensor:
        return self.random.labels(self.level, images, classes)

    def views(self, level: int, images: Sequence[int], count: int, size: int, symmetric: bool) -> ViewParameters:
        return self.random.views(self.level, images, count, size, symmetric)


# --- picture and ranking (rows 7 and 13) ------------------------------------------------------------------------------


@dataclass(frozen=True)
class SquashedPicture:
    """The whole picture scaled to a square: Lanczos for the picture, nearest neighbor for the mask."""

    width: int
    height: int

    def cut(self, picture: Tensor, size: int) -> Tensor:
        """[1, 3, height, width] in 0..1 → [1, 3, size, size], through 8 bits as in the reference code."""
        pixels = (picture[0].permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        small = Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].to(picture) / 255

    def cut_mask(self, mask: EditMask, size: int) -> EditMask:
        """[1, 1, height, width] → [1, 1, size, size].

        Raises:
            BlendedError: if nothing of the mask is left.
        """
        small = Image.fromarray(mask.values[0, 0].numpy()).resize((size, size), Image.Resampling.NEAREST)
        values = torch.from_numpy(np.array(small))[None, None]
        if not bool((values > 0).any()):
            raise BlendedError(
                f"nothing of the mask is left when the whole picture is scaled to {size}×{size}; use the crop 'region'.", option="crop"
            )
        return mask.with_values(values)

    def put_back(self, edited: Tensor, picture: Tensor) -> Tensor:
        """Scaled to the size of the picture; [B, C, size, size] → [B, C, height, width]."""
        return resize(edited, (self.height, self.width))

    def inner(self) -> Box:
        """The whole picture."""
        return Box(0, 0, self.width, self.height)

    def within(self, box: Box) -> SquashedPicture:
        """Itself: the box is the whole picture."""
        return self


@torch.no_grad()
def clip_distance(
    pictures: Tensor, mask: Tensor, clip: ClipModel, prompt: Prompt, distance: Distance = unclamped_distance, antialias: bool = True
) -> Tensor:
    """The reference code's ranking score (row 7): values in 0..1, black outside the mask, not normalized; [B, 3, H, W] in −1..1 → [B]."""
    masked = (pictures + 1).div(2).clamp(0, 1) * mask
    size = (clip.image_size, clip.image_size)
    small = masked if masked.shape[-2:] == size else F.interpolate(masked, size=size, mode="bilinear", antialias=antialias)
    return prompt_distance(clip.encode_normalized(small), prompt, distance)
