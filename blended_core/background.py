"""Algorithm 2's background inside a sampler of another program, which calls its network at noise levels given by σ.

Algorithm 2 blends after every step: with the source noised afresh to the level that was reached, by the mask of that level. A call of the network at the
level after j of T steps therefore has two blends beside it: number j before it, and number j + 1 after it, which the sampler makes of x̂0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import BlendedError
from .mask import EditMask, dilated, distance_inward
from .random import RandomSource

AUTO = -1
"""Of the number of dilations: :data:`DILATIONS` for a thin mask, else none."""
DILATIONS = 3
"""Of progressive mask shrinking (Avrahami, Fried, Lischinski, "Blended Latent Diffusion", 2023): squares of 7, 5 and 3, then the mask itself."""
THIN = 2
"""A mask is thin if none of its samples is farther than this from one outside."""
SAME_LEVEL = 1e-5
"""Relative difference of σ up to which two levels are one."""
PLACES = 1000
"""Between two levels a sampler's calls are told apart in this many places."""


def dilation_at(blend: int, steps: int, dilations: int) -> int:
    """By how many samples the mask of a blend is grown on each side.

    ``dilations`` + 1 masks share the steps: the one grown by ``dilations``, the next smaller one, …, the mask itself. Blend i of T has mask
    i // (T // (dilations + 1) + 1), so 50 steps and three dilations give 13, 13, 13 and 11. The last blend, T, has the mask itself.
    """
    if blend >= steps:
        return 0
    return max(dilations - blend // (steps // (dilations + 1) + 1), 0)


def dilations_for(mask: EditMask) -> int:
    """What :data:`AUTO` means for a mask [..., H, W]."""
    inside = mask.inside.reshape(-1, 1, *mask.values.shape[-2:])
    return DILATIONS if float(distance_inward(inside, THIN + 1).max()) <= THIN else 0


def empty_noise_mask(mask: Tensor) -> BlendedError:
    """The error about a noise mask [B, C, …] with nothing inside."""
    size = "×".join(str(n) for n in reversed(mask.shape[2:]))
    peak = float(mask.nan_to_num(0.0).max()) if mask.numel() else 0.0
    return BlendedError(
        f"the noise mask is empty at the size of the samples, {size} (peak {peak:.3g}): the mask is black, or its white part is too thin. Grow the mask, for "
        "a latent model by 8 pixels or more, before it is set on the LATENT."
    )


@dataclass(frozen=True, eq=False)
class Background:
    """Noise and masks of the blends of one run.

    Attributes:
        mask: [B, …] in the shape of the samples, or with 1 in place of B or of the channels.
        sigmas: of the run, the noisiest first; the last one may be 0.
        random: its streams "background" are named by level as those of :func:`~blended_core.sample.blended_diffusion`.
        dilations: number of dilations; 0 for none.
    """

    mask: EditMask
    sigmas: tuple[float, ...]
    random: RandomSource
    dilations: int = 0

    @classmethod
    def of(cls, mask: Tensor, sigmas: Sequence[float], random: RandomSource, dilations: int = AUTO) -> Background:
        """The background for a mask in 0..1, whose gray values are released by level, as those of a soft mask.

        Args:
            mask: [B, …], over whose last two axes it is dilated. Masks with fewer than two axes after the channels (audio) are not dilated.
            dilations: number of dilations, or :data:`AUTO`.

        Raises:
            BlendedError: if nothing is inside.
        """
        used = EditMask.of(mask, "soft")
        if not bool(used.inside.any()):
            raise empty_noise_mask(mask)
        if mask.ndim < 4:
            dilations = 0
        return cls(used, tuple(sigmas), random, dilations_for(used) if dilations == AUTO else dilations)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.sigmas) - 1

    def place(self, sigma: float) -> tuple[int, float]:
        """(j, f): the level after j steps, or for 0 < f < 1 between those after j and j + 1, f of the way down in σ."""
        for j, level in enumerate(self.sigmas):
            if sigma >= level or math.isclose(sigma, level, rel_tol=SAME_LEVEL):
                if j == 0 or math.isclose(sigma, level, rel_tol=SAME_LEVEL):
                    return j, 0.0
                above = self.sigmas[j - 1]
                return j - 1, (above - sigma) / (above - level)
        return self.steps, 0.0

    def noise(self, sigma: float, shape: Sequence[int]) -> Tensor | None:
        """Standard normal of a shape [B, …] for the background at σ, on the CPU; None at the level where the run starts, whose noise the samples have.

        It depends on nothing but the seed, the row and the level, however often a sampler calls there.
        """
        j, between = self.place(sigma)
        if j == 0 and not between:
            return None
        rows = range(shape[0])
        # An index of a level counts from the clean end.
        level = self.steps - 1 - j
        if not between:
            return self.random.noise("background", level, rows, tuple(shape[1:]))
        return self.random.noise(f"background {round(between * PLACES)}", level, rows, tuple(shape[1:]))

    def weights_before(self, sigma: float) -> Tensor:
        """The mask of the blend before a call at σ, 0 or 1."""
        j, between = self.place(sigma)
        return self._weights(j + 1 if between else j)

    def weights_after(self, sigma: float) -> Tensor:
        """The mask of the blend after the step that a call at σ is for."""
        return self._weights(self.place(sigma)[0] + 1)

    def _weights(self, blend: int) -> Tensor:
        steps = self.steps
        grown = self.mask.with_values(dilated(self.mask.values, dilation_at(blend, steps, self.dilations)))
        # Blend number j follows the step at index T − j.
        return grown.at_level(max(steps - blend, 0), steps - 1)

    def restored(self, samples: Tensor, source: Tensor) -> Tensor:
        """The clean samples of a run with the source, to the last bit, outside the mask; the samples themselves if the run ends at a noisy level."""
        if self.sigmas[-1] > 0:
            return samples
        return torch.where(self.mask.inside.to(samples.device), samples, source.to(samples))
