"""Noise schedules, respacing and exact indices; float64 on the CPU.

Sources: Ho et al., "Denoising Diffusion Probabilistic Models" (2020), for the linear schedule and the posterior; Nichol &
Dhariwal (2021), for the cosine schedule, respacing and the learned variance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from .errors import BlendedError
from .respacing import LOG_SNR, space_timesteps, step_count

Float64 = NDArray[np.float64]

LOWEST_LOG_SNR = -10.2
"""About where the linear schedule ends."""

CLEAN = -1
"""The level below index 0: no noise."""


def linear_betas(steps: int) -> Float64:
    """β from 1e-4 to 0.02 for 1000 steps, scaled so that processes of other lengths end at the same noise level. Shape [steps]."""
    scale = 1000 / steps
    return np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)


def cosine_betas(steps: int, max_beta: float = 0.999) -> Float64:
    """β whose ᾱ follows a squared cosine (offset 0.008). Shape [steps]."""

    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), max_beta) for i in range(steps)], np.float64)


BETAS = {"linear": linear_betas, "cosine": cosine_betas}


def named_betas(name: str, steps: int) -> Float64:
    """β of a schedule by name, 'linear' or 'cosine'. Shape [steps], float64."""
    if name not in BETAS:
        raise BlendedError(f"unknown noise schedule {name!r}; known are {', '.join(BETAS)}.")
    if steps < 1:
        raise BlendedError(f"a noise schedule has at least 1 step, not {steps}.")
    betas = BETAS[name](steps)
    if not ((betas > 0) & (betas <= 1)).all():
        raise BlendedError(f"a {name} schedule of {steps} steps has a β of {betas.max():.3g}, outside (0, 1]; use at least 21 steps.")
    return betas


def log_snr_timesteps(alphas_cumprod: Float64, count: int) -> list[int]:
    """``count`` steps of a process, ascending, from the first to the last, whose logarithms of the signal-to-noise ratio are as evenly spaced as
    whole steps allow.

    Solvers of high order have their smallest error with such steps (Lu et al. 2022, "DPM-Solver++"). Beyond :data:`LOWEST_LOG_SNR` only the last step
    is kept: the cosine schedule has hundreds of steps there, all of nothing but noise.

    Raises:
        BlendedError: if the process has fewer steps.
    """
    steps = len(alphas_cumprod)
    if count > steps:
        raise BlendedError(f"respacing 'logsnr{count}' keeps {count} of {steps} steps; keep at most {steps}.", option="steps")
    log_snr = np.log(alphas_cumprod / (1 - alphas_cumprod))
    targets = np.linspace(log_snr[0], max(log_snr[-1], LOWEST_LOG_SNR), count)
    nearest = np.rint(np.interp(-targets, -log_snr, np.arange(steps))).astype(np.int64)
    # Where even spacing would need less than one step, at the clean end, every step is kept.
    spread = np.maximum.accumulate(nearest - np.arange(count)) + np.arange(count)
    kept = np.minimum(spread, np.arange(steps - count, steps))
    kept[-1] = steps - 1 if count > 1 else kept[-1]
    return [int(step) for step in kept]


@dataclass(frozen=True)
class Schedule:
    """A (respaced) diffusion process.

    The levels are indexed from ``len(self) − 1`` (most noise) to 0; :data:`CLEAN` is the picture itself. Arrays have shape [len(self)] and are
    float64; ``timestep_map[i]`` is the step of the original process at index i.
    """

    name: str = "linear"
    steps: int = 1000
    respacing: str = ""
    rescale_timesteps: bool = True

    def __len__(self) -> int:
        return len(self.timestep_map)

    @cached_property
    def timestep_map(self) -> NDArray[np.int64]:
        """Original step of each index, ascending."""
        text = self.respacing.strip() or str(self.steps)
        if text.startswith(LOG_SNR):
            whole = np.cumprod(1 - named_betas(self.name, self.steps), dtype=np.float64)
            return np.array(log_snr_timesteps(whole, step_count(text[len(LOG_SNR) :], text)), np.int64)
        return np.array(space_timesteps(self.steps, text), np.int64)

    @cached_property
    def betas(self) -> Float64:
        """β of the respaced process: products of the original's α between kept steps."""
        kept = np.cumprod(1 - named_betas(self.name, self.steps))[self.timestep_map]
        betas: Float64 = 1 - kept / np.append(1.0, kept[:-1])
        return betas

    @cached_property
    def alphas_cumprod(self) -> Float64:
        """ᾱ."""
        return np.cumprod(1 - self.betas, dtype=np.float64)

    @cached_property
    def alphas_cumprod_prev(self) -> Float64:
        """ᾱ of the next cleaner index; 1 for index 0."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def alphas_cumprod_next(self) -> Float64:
        """ᾱ of the next noisier index; 0 for the last."""
        return np.append(self.alphas_cumprod[1:], 0.0)

    @cached_property
    def sqrt_alphas_cumprod(self) -> Float64:
        """√ᾱ."""
        return np.sqrt(self.alphas_cumprod)

    @cached_property
    def sqrt_one_minus_alphas_cumprod(self) -> Float64:
        """√(1−ᾱ)."""
        return np.sqrt(1 - self.alphas_cumprod)

    @cached_property
    def log_one_minus_alphas_cumprod(self) -> Float64:
        """log(1−ᾱ)."""
        return np.log(1 - self.alphas_cumprod)

    @cached_property
    def half_log_snr(self) -> Float64:
        """λ = ½·log(ᾱ / (1−ᾱ))."""
        return 0.5 * np.log(self.alphas_cumprod / (1 - self.alphas_cumprod))

    @cached_property
    def sqrt_recip_alphas_cumprod(self) -> Float64:
        """1/√ᾱ."""
        return np.sqrt(1 / self.alphas_cumprod)

    @cached_property
    def sqrt_recipm1_alphas_cumprod(self) -> Float64:
        """√(1/ᾱ − 1)."""
        return np.sqrt(1 / self.alphas_cumprod - 1)

    @cached_property
    def posterior_variance(self) -> Float64:
        """β̃, the variance of q(x_{t−1} | x_t, x_0); 0 for index 0."""
        variance: Float64 = self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        return variance

    @cached_property
    def posterior_log_variance_clipped(self) -> Float64:
        """log β̃, where index 0 has the value of index 1 because its own is −∞."""
        variance = self.posterior_variance
        first = variance[1] if len(variance) > 1 else self.betas[0]
        logarithm: Float64 = np.log(np.append(first, variance[1:]))
        return logarithm

    @cached_property
    def posterior_mean_coef1(self) -> Float64:
        """Weight of x_0 in the mean of q(x_{t−1} | x_t, x_0)."""
        weight: Float64 = self.betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        return weight

    @cached_property
    def posterior_mean_coef2(self) -> Float64:
        """Weight of x_t in the mean of q(x_{t−1} | x_t, x_0)."""
        weight: Float64 = (1 - self.alphas_cumprod_prev) * np.sqrt(1 - self.betas) / (1 - self.alphas_cumprod)
        return weight

    def model_timestep(self, index: int) -> float:
        """The timestep that the network gets for an index: the original step, in units of a 1000-step process if rescaled."""
        step = float(self.timestep_map[index])
        return step * (1000.0 / self.steps) if self.rescale_timesteps else step

    def start_index(self, strength: float) -> int:
        """The first index of an edit of that strength: the ⌊strength·T + ½⌋ least noisy of T levels are denoised.

        A strength of 0.75 on 100 steps gives 74, as ``skip_timesteps=25`` of the reference does. With 'logsnrN' a strength means the same noise as
        in the whole process: the level that is nearest to it.
        """
        if not 0 < strength <= 1:
            raise BlendedError(f"strength is {strength}; give a number above 0 and at most 1.", option="strength")
        if self.respacing.strip().startswith(LOG_SNR):
            first = max(1, math.floor(strength * self.steps + 0.5)) - 1
            whole = cached_schedule(self.name, self.steps, "", self.rescale_timesteps)
            return int(np.abs(self.half_log_snr - whole.half_log_snr[first]).argmin())
        return max(1, math.floor(strength * len(self) + 0.5)) - 1


@lru_cache(maxsize=32)
def cached_schedule(name: str, steps: int, respacing: str, rescale_timesteps: bool) -> Schedule:
    """A Schedule built once for equal arguments."""
    return Schedule(name, steps, respacing, rescale_timesteps)
