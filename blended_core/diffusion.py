"""The diffusion process as pure functions, with the names of the papers.

Images are [B, C, H, W] in −1..1. ``index`` is a level of a :class:`~blended_core.schedule.Schedule`: an int for the whole batch, or an int64 tensor [B].
Sources: Ho et al. (2020) for DDPM, Song et al. (2021) for DDIM, Lu et al. (2022) for DPM-Solver++, Nichol & Dhariwal (2021) for the learned variance, Salimans & Ho (2022) for v,
Dhariwal & Nichol (2021), algorithms 1 and 2, for guidance.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import BlendedError
from .schedule import BETAS, CLEAN, Float64, Schedule, cached_schedule

OBJECTIVES = ("eps", "v", "x0")
VARIANCES = ("learned_range", "fixed_small", "fixed_large")
MAX_STEPS = 100_000
"""Of a process; published ones have 4000 at most."""


@dataclass(frozen=True)
class DiffusionConfig:
    """The process that a network was trained on.

    Attributes:
        schedule: name of the noise schedule. steps: its length.
        rescale_timesteps: the network receives timesteps in units of a process of 1000 steps.
        objective: what the network predicts, 'eps', 'v' or 'x0'.
        variance: 'learned_range' (the second half of the output channels interpolates between β̃ and β), 'fixed_small' (β̃) or 'fixed_large' (β).
    """

    schedule: str = "linear"
    steps: int = 1000
    rescale_timesteps: bool = True
    objective: str = "eps"
    variance: str = "learned_range"

    def __post_init__(self) -> None:
        if self.schedule not in BETAS:
            raise BlendedError(f"unknown noise schedule {self.schedule!r}; known are {', '.join(BETAS)}.")
        if not 1 <= self.steps <= MAX_STEPS:
            raise BlendedError(f"steps is {self.steps}; a diffusion process has at least 1 and at most {MAX_STEPS}.")
        if self.objective not in OBJECTIVES:
            raise BlendedError(f"unknown objective {self.objective!r}; known are {', '.join(OBJECTIVES)}.")
        if self.variance not in VARIANCES:
            raise BlendedError(f"unknown variance {self.variance!r}; known are {', '.join(VARIANCES)}.")

    def respaced(self, respacing: str | int) -> Schedule:
        """The process shortened to ``respacing`` (see :func:`~blended_core.respacing.space_timesteps`)."""
        return cached_schedule(self.schedule, self.steps, str(respacing), self.rescale_timesteps)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True, repr=False)
class Prediction:
    """One prediction of the network; all [B, C, H, W].

    ``mean``, ``variance`` and ``log_variance`` are those of p(x_{t−1} | x_t); ``x0`` is x̂0, not clamped.
    """

    x0: Tensor
    mean: Tensor
    variance: Tensor
    log_variance: Tensor

    def __repr__(self) -> str:
        return f"Prediction({tuple(self.x0.shape)})"

    def moved(self, shift: Tensor, index: int | Tensor, schedule: Schedule) -> Prediction:
        """The prediction for x̂0 + shift. The mean moves by the shift times the coefficient that x̂0 has in it."""
        coef = coefficient(schedule.posterior_mean_coef1, index, shift)
        return replace(self, x0=self.x0 + shift, mean=self.mean + coef * shift)

    def detach(self) -> Prediction:
        """The same values without a graph."""
        return Prediction(self.x0.detach(), self.mean.detach(), self.variance.detach(), self.log_variance.detach())


def coefficient(values: Float64, index: int | Tensor, like: Tensor) -> Tensor | float:
    """``values[index]`` for multiplication with a batch: a float, or [B, 1, 1, 1] in the dtype and on the device of ``like``."""
    if isinstance(index, int):
        return float(values[index])
    return torch.as_tensor(values[index.cpu().numpy()], dtype=like.dtype).to(like.device)[:, None, None, None]


def q_sample(x0: Tensor, index: int | Tensor, noise: Tensor, schedule: Schedule) -> Tensor:
    """A sample of q(x_t | x_0): √ᾱ·x0 + √(1−ᾱ)·noise; ``x0`` itself for the level CLEAN."""
    if isinstance(index, int) and index == CLEAN:
        return x0
    signal = coefficient(schedule.sqrt_alphas_cumprod, index, x0)
    return signal * x0 + coefficient(schedule.sqrt_one_minus_alphas_cumprod, index, x0) * noise


def predict_x0(x_t: Tensor, output: Tensor, index: int | Tensor, schedule: Schedule, objective: str = "eps") -> Tensor:
    """x̂0 from the output of the network; ``objective``: 'eps', 'v' or 'x0'."""
    if objective == "eps":
        a = coefficient(schedule.sqrt_recip_alphas_cumprod, index, x_t)
        return a * x_t - coefficient(schedule.sqrt_recipm1_alphas_cumprod, index, x_t) * output
    if objective == "v":
        a = coefficient(schedule.sqrt_alphas_cumprod, index, x_t)
        return a * x_t - coefficient(schedule.sqrt_one_minus_alphas_cumprod, index, x_t) * output
    if objective == "x0":
        return output
    raise BlendedError(f"unknown objective {objective!r}; known are {', '.join(OBJECTIVES)}.")


def predict_eps(x_t: Tensor, x0: Tensor, index: int | Tensor, schedule: Schedule) -> Tensor:
    """The ε for which q_sample(x0) is ``x_t``."""
    a = coefficient(schedule.sqrt_recip_alphas_cumprod, index, x_t)
    return (a * x_t - x0) / coefficient(schedule.sqrt_recipm1_alphas_cumprod, index, x_t)


def posterior_mean(x0: Tensor, x_t: Tensor, index: int | Tensor, schedule: Schedule) -> Tensor:
    """The mean of q(x_{t−1} | x_t, x_0)."""
    c0 = coefficient(schedule.posterior_mean_coef1, index, x_t)
    return c0 * x0 + coefficient(schedule.posterior_mean_coef2, index, x_t) * x_t


def log_variance(fraction: Tensor | None, index: int | Tensor, schedule: Schedule, variance: str, like: Tensor) -> tuple[Tensor, Tensor]:
    """(variance, logarithm of the variance) of p(x_{t−1} | x_t), broadcastable to ``like``.

    Args:
        fraction: for 'learned_range' the second half of the output channels, in −1..1; else None.
        variance: as :attr:`DiffusionConfig.variance`.
    """
    if variance == "learned_range":
        if fraction is None:
            raise BlendedError("variance is 'learned_range', but the network predicts no variance; use fixed_small or fixed_large.")
        low = coefficient(schedule.posterior_log_variance_clipped, index, like)
        high = coefficient(np.log(schedule.betas), index, like)
        share = (fraction + 1) / 2
        log = share * high + (1 - share) * low
        return log.exp(), log
    if variance == "fixed_small":
        values, logs = schedule.posterior_variance, schedule.posterior_log_variance_clipped
    elif variance == "fixed_large":
        first = schedule.posterior_variance[1] if len(schedule) > 1 else schedule.betas[0]
        values = np.append(first, schedule.betas[1:])
        logs = np.log(values)
    else:
        raise BlendedError(f"unknown variance {variance!r}; known are {', '.join(VARIANCES)}.")
    ones = torch.ones_like(like)
    return ones * coefficient(values, index, like), ones * coefficient(logs, index, like)


def ddpm_step(prediction: Prediction, index: int | Tensor, noise: Tensor, gradient: Tensor | None = None) -> Tensor:
    """x_{t−1} ~ N(μ + Σ·g, Σ), without noise at index 0. ``gradient`` g is that of log p(y | x_t), i.e. of minus the loss."""
    mean = prediction.mean if gradient is None else prediction.mean + prediction.variance * gradient
    deviation = (0.5 * prediction.log_variance).exp()
    if isinstance(index, int):
        return mean if index == 0 else mean + deviation * noise
    return mean + (index != 0).to(mean)[:, None, None, None] * deviation * noise


def guided_x0(x_t: Tensor, x0: Tensor, index: int | Tensor, schedule: Schedule, gradient: Tensor) -> Tensor:
    """x̂0 for ε̂ = ε − √(1−ᾱ)·g, guidance of DDIM."""
    eps = predict_eps(x_t, x0, index, schedule)
    eps = eps - coefficient(schedule.sqrt_one_minus_alphas_cumprod, index, x_t) * gradient
    return predict_x0(x_t, eps, index, schedule)


def ddim_step(x_t: Tensor, x0: Tensor, index: int | Tensor, noise: Tensor | None, schedule: Schedule, eta: float = 0.0) -> Tensor:
    """x_{t−1} of DDIM from x̂0, guided or not. ``eta``: 0 is deterministic, 1 has the posterior variance of DDPM."""
    eps = predict_eps(x_t, x0, index, schedule)
    ab, prev = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    sigmas = eta * np.sqrt((1 - prev) / (1 - ab)) * np.sqrt(1 - ab / prev)
    mean = x0 * coefficient(np.sqrt(prev), index, x_t) + coefficient(np.sqrt(1 - prev - sigmas**2), index, x_t) * eps
    if eta == 0 or (isinstance(index, int) and index == 0):
        return mean
    if noise is None:
        raise BlendedError(f"DDIM with eta {eta} needs noise.")
    # σ is 0 at index 0, where ᾱ_prev is 1, so no mask is needed.
    return mean + coefficient(sigmas, index, x_t) * noise


def dpmpp_2m_step(
    x_t: Tensor, x0: Tensor, previous: Tensor | None, index: int, noise: Tensor | None, schedule: Schedule, eta: float = 0.0
) -> Tensor:
    """x_{t−1} of DPM-Solver++(2M) from x̂0, guided or not.

    With λ = ½·log(ᾱ/(1−ᾱ)), h its step to the next level, and D = x̂0 + (x̂0 − x̂0 of the level before)·h/(2·h of the level before)::

        x_{t−1} = σ_{t−1}/σ_t · exp(−η·h)·x_t + √ᾱ_{t−1}·(1 − exp(−(1+η)·h))·D + σ_{t−1}·√(1 − exp(−2·η·h))·noise

    Args:
        x_t, x0: [B, C, H, W]. previous: x̂0 of the next noisier level, or None at the first step, which is then of first order, a step of DDIM.
        index: the level. noise: standard normal [B, C, H, W], used where eta is above 0.
        eta: 0 is the probability flow, 1 the random process (SDE-DPM-Solver++).
    """
    if index == 0:
        return x0
    lambdas, deviations = schedule.half_log_snr, schedule.sqrt_one_minus_alphas_cumprod
    step = float(lambdas[index - 1] - lambdas[index])
    target = x0
    if previous is not None:
        target = x0 + (x0 - previous) * (0.5 * step / float(lambdas[index] - lambdas[index + 1]))
    x = x_t * float(deviations[index - 1] / deviations[index] * np.exp(-eta * step))
    x = x + target * float(schedule.sqrt_alphas_cumprod[index - 1] * -np.expm1(-(1 + eta) * step))
    if eta == 0:
        return x
    if noise is None:
        raise BlendedError(f"DPM-Solver++ with eta {eta} needs noise.")
    return x + noise * float(deviations[index - 1] * np.sqrt(-np.expm1(-2 * eta * step)))
