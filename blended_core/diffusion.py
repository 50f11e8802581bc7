"""The diffusion process, in the papers' names; every function is pure.

Pictures are [B, C, H, W] in −1..1. ``index`` is a place in a :class:`~blended_core.schedule.Schedule`: an int for the
whole batch, or an int64 tensor [B]. Sources: Ho et al. (2020) for DDPM, Song et al. (2021) for DDIM, Nichol & Dhariwal
(2021) for the learned variance, Salimans & Ho (2022) for v, Dhariwal & Nichol (2021), algorithms 1 and 2, for guidance.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import BlendedError
from .schedule import BETAS, CLEAN, Float64, Schedule, cached_schedule

if TYPE_CHECKING:
    from .adm.detect import Detection

OBJECTIVES = ("eps", "v", "x0")
VARIANCES = ("learned_range", "fixed_small", "fixed_large")


@dataclass(frozen=True)
class DiffusionConfig:
    """The process that a network was trained on.

    ``objective``: what its output stands for, 'eps', 'v' or 'x0'. ``variance``: 'learned_range' (the second half of the
    output interpolates between β̃ and β), 'fixed_small' (β̃) or 'fixed_large' (β).
    """

    schedule: str = "linear"
    steps: int = 1000
    rescale_timesteps: bool = True
    objective: str = "eps"
    variance: str = "learned_range"

    def __post_init__(self) -> None:
        if self.schedule not in BETAS:
            raise BlendedError(f"unknown noise schedule {self.schedule!r}; known are {', '.join(BETAS)}.")
        if self.steps < 1:
            raise BlendedError(f"a diffusion process has at least 1 step, not {self.steps}.")
        if self.objective not in OBJECTIVES:
            raise BlendedError(f"unknown objective {self.objective!r}; known are {', '.join(OBJECTIVES)}.")
        if self.variance not in VARIANCES:
            raise BlendedError(f"unknown variance {self.variance!r}; known are {', '.join(VARIANCES)}.")

    def respaced(self, respacing: str | int) -> Schedule:
        """The process shortened to ``respacing`` (see :func:`~blended_core.schedule.space_timesteps`)."""
        return cached_schedule(self.schedule, self.steps, str(respacing), self.rescale_timesteps)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Prediction:
    """What one forward of the network says about x_{t−1}; all [B, C, H, W].

    ``mean``, ``variance`` and ``log_variance`` are those of p(x_{t−1} | x_t); ``x0`` is x̂0, not clamped.
    """

    x0: Tensor
    mean: Tensor
    variance: Tensor
    log_variance: Tensor

    def detach(self) -> Prediction:
        """The same values without a graph."""
        return Prediction(self.x0.detach(), self.mean.detach(), self.variance.detach(), self.log_variance.detach())


def coefficient(values: Float64, index: int | Tensor, like: Tensor) -> Tensor | float:
    """``values[index]`` in a form that multiplies a batch: a float, or [B, 1, 1, 1] in the dtype and device of ``like``."""
    if isinstance(index, int):
        return float(values[index])
    return torch.as_tensor(values[index.cpu().numpy()], dtype=like.dtype).to(like.device)[:, None, None, None]


def q_sample(x0: Tensor, index: int | Tensor, noise: Tensor, schedule: Schedule) -> Tensor:
    """A draw of q(x_t | x_0): √ᾱ·x0 + √(1−ᾱ)·noise. For CLEAN, ``x0`` itself, and the noise is not used."""
    if isinstance(index, int) and index == CLEAN:
        return x0
    signal = coefficient(schedule.sqrt_alphas_cumprod, index, x0)
    return signal * x0 + coefficient(schedule.sqrt_one_minus_alphas_cumprod, index, x0) * noise


def predict_x0(x_t: Tensor, output: Tensor, index: int | Tensor, schedule: Schedule, objective: str = "eps") -> Tensor:
    """x̂0 from the network's output, which is ε, v or x0 as ``objective`` says."""
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
    """The ε that turns ``x0`` into ``x_t``."""
    a = coefficient(schedule.sqrt_recip_alphas_cumprod, index, x_t)
    return (a * x_t - x0) / coefficient(schedule.sqrt_recipm1_alphas_cumprod, index, x_t)


def posterior_mean(x0: Tensor, x_t: Tensor, index: int | Tensor, schedule: Schedule) -> Tensor:
    """The mean of q(x_{t−1} | x_t, x_0)."""
    c0 = coefficient(schedule.posterior_mean_coef1, index, x_t)
    return c0 * x0 + coefficient(schedule.posterior_mean_coef2, index, x_t) * x_t


def log_variance(fraction: Tensor | None, index: int | Tensor, schedule: Schedule, variance: str, like: Tensor) -> tuple[Tensor, Tensor]:
    """(variance, its logarithm) of p(x_{t−1} | x_t), broadcastable to ``like``.

    ``fraction`` is the network's second half of channels in −1..1 for 'learned_range', else None.
    """
    if variance == "learned_range":
        if fraction is None:
            raise BlendedError("variance is 'learned_range', but the network predicts none; use fixed_small or fixed_large.")
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
    """x_{t−1} ~ N(μ + Σ·g, Σ); g is the gradient of log p(y | x_t), that is, of minus the loss. No noise at index 0."""
    mean = prediction.mean if gradient is None else prediction.mean + prediction.variance * gradient
    deviation = (0.5 * prediction.log_variance).exp()
    if isinstance(index, int):
        return mean if index == 0 else mean + deviation * noise
    return mean + (index != 0).to(mean)[:, None, None, None] * deviation * noise


def guided_x0(x_t: Tensor, x0: Tensor, index: int | Tensor, schedule: Schedule, gradient: Tensor) -> Tensor:
    """x̂0 of the score-shifted ε̂ = ε − √(1−ᾱ)·g, as DDIM takes guidance."""
    eps = predict_eps(x_t, x0, index, schedule)
    eps = eps - coefficient(schedule.sqrt_one_minus_alphas_cumprod, index, x_t) * gradient
    return predict_x0(x_t, eps, index, schedule)


def ddim_step(x_t: Tensor, x0: Tensor, index: int | Tensor, noise: Tensor | None, schedule: Schedule, eta: float = 0.0) -> Tensor:
    """x_{t−1} of DDIM from x̂0 (already guided, if at all). ``eta`` 0 is deterministic, 1 has DDPM's posterior variance."""
    eps = predict_eps(x_t, x0, index, schedule)
    ab, prev = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    sigmas = eta * np.sqrt((1 - prev) / (1 - ab)) * np.sqrt(1 - ab / prev)
    mean = x0 * coefficient(np.sqrt(prev), index, x_t) + coefficient(np.sqrt(1 - prev - sigmas**2), index, x_t) * eps
    if eta == 0 or (isinstance(index, int) and index == 0):
        return mean
    if noise is None:
        raise BlendedError(f"DDIM with eta {eta} needs noise.")
    # σ is 0 at index 0 because ᾱ_prev is 1 there, so no mask is needed.
    return mean + coefficient(sigmas, index, x_t) * noise


def ddim_reverse_step(x_t: Tensor, x0: Tensor, index: int | Tensor, schedule: Schedule) -> Tensor:
    """One deterministic step towards more noise, the inverse of :func:`ddim_step` with eta 0; for inverting a picture."""
    eps = predict_eps(x_t, x0, index, schedule)
    following = schedule.alphas_cumprod_next
    return x0 * coefficient(np.sqrt(following), index, x_t) + coefficient(np.sqrt(1 - following), index, x_t) * eps


class DiffusionModel:
    """A network together with the process it was trained on.

    Args:
        network: maps (x_t [B,C,H,W], timesteps [B], labels or None) to [B, C or 2C, H, W].
        config: the process. The variance must fit the network: 'learned_range' if and only if it has 2C outputs.
        image_size: the side in pixels that it was trained at; other sizes work if divisible by ``multiple_of``.
        num_classes: None for an unconditional network.
    """

    def __init__(
        self, network: nn.Module, config: DiffusionConfig, image_size: int, num_classes: int | None = None,
        multiple_of: int = 1, label_dim: int = 0,
    ) -> None:  # fmt: skip
        self.network = network
        self.config = config
        self.image_size = image_size
        self.num_classes = num_classes
        self.multiple_of = multiple_of
        self.label_dim = label_dim
        self.found: Detection | None = None  # how a checkpoint's settings were decided; set by load_ddpm

    @property
    def detection(self) -> Detection:
        """How a checkpoint's settings were decided; an error for a model that comes from no checkpoint."""
        if self.found is None:
            raise BlendedError("this model was not loaded from a checkpoint, so nothing is known of how its settings were decided.")
        return self.found

    @classmethod
    def from_unet(cls, unet: Any, config: DiffusionConfig) -> DiffusionModel:
        """Wraps a :class:`~blended_core.adm.unet.UNet`; a variance that does not fit its outputs is an error."""
        if unet.config.learn_sigma != (config.variance == "learned_range"):
            has = "predicts a variance" if unet.config.learn_sigma else "predicts no variance"
            raise BlendedError(f"variance is set to {config.variance!r}, but the network {has}.")
        return cls(
            unet, config, unet.config.image_size, unet.config.num_classes, unet.config.downsampling,
            4 * unet.config.model_channels,
        )  # fmt: skip

    def predict(
        self, x_t: Tensor, index: int | Tensor, schedule: Schedule, labels: Tensor | None = None, clip_denoised: bool = False
    ) -> Prediction:
        """One forward of the network: x̂0 and the mean and variance of p(x_{t−1} | x_t).

        ``labels`` as in :meth:`UNet.forward`. ``clip_denoised`` clamps x̂0 to −1..1; the method never does.
        """
        if isinstance(index, int):
            timesteps = torch.full((x_t.shape[0],), schedule.model_timestep(index), device=x_t.device)
        else:
            timesteps = torch.tensor([schedule.model_timestep(int(i)) for i in index], device=x_t.device)
        output = self.network(x_t, timesteps, labels)
        fraction = None
        if self.config.variance == "learned_range":
            output, fraction = output.chunk(2, dim=1)
        x0 = predict_x0(x_t, output, index, schedule, self.config.objective)
        if clip_denoised:
            x0 = x0.clamp(-1, 1)
        variance, log = log_variance(fraction, index, schedule, self.config.variance, x_t)
        return Prediction(x0, posterior_mean(x0, x_t, index, schedule), variance, log)
