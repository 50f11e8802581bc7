"""Guidance where another program predicts x̂0 and takes the steps: the shift of x̂0 that does there what guidance does in this package.

The samplers of k-diffusion, which ComfyUI uses, hold samples in other units than this package. Three things are needed to guide them: the weight of a
gradient in their units (:class:`Parameterization`), how much noise a sampler adds (:data:`SAMPLERS`), and pixels, where the model works on latents
(:class:`LinearRGB`, or any differentiable decoder). Sources: Dhariwal & Nichol (2021), algorithms 1 and 2; Karras et al. (2022) for σ and σ_data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .clip.model import ClipModel, Prompt
from .device import DeviceContext
from .guidance import Guidance, LossGradient
from .losses import PerceptualDistance, StepInput
from .memory import run_in_parts
from .options import GuidanceOptions
from .random import RandomSource
from .sample import losses_from

LARGEST_RATIO = 15.0
"""Limit of the noise-to-signal ratio of a flow, whose start has no signal at all. Stable Diffusion starts from 14.6."""
UNKNOWN_ETA = 1.0
"""Noise that is assumed of an unknown sampler: the more cautious of both, because it is guided half as far."""
SEARCH_STEPS = 24
"""Halvings of 0..1 that find the share of the levels at a σ."""


@dataclass(frozen=True)
class Parameterization:
    """How a sample x of a model is made of an image x0 and noise n, and with it the weight of a gradient.

    x = x0 + σ·n, for images of standard deviation ``sigma_data``, or of a flow x = (1 − σ)·x0 + σ·k·n with ``noise_scale`` k. The noise-to-signal ratio is
    s = σ/σ_data, or s = k·σ/(1 − σ).

    Guidance in the units of this package, where x_t = √ᾱ·x0 + √(1−ᾱ)·n with 1/ᾱ = 1 + s², is ε̂ = ε − √(1−ᾱ)·g for the gradient g of minus the
    losses with respect to x_t. That moves x̂0 by (1−ᾱ)/√ᾱ·g = s²/√(1+s²)·g, and the mean of the posterior by β/√α·g, which tends to the Σ·g of DDPM where steps are small.
    Two units remain:

    - A gradient at x̂0 stands for that at x_t, as everywhere in this package. Both image and gradient are in units of σ_data, so that factor comes
      squared: **σ²/√(1+s²)**; of a flow **s²/√(1+s²)**.
    - A gradient through the network is one with respect to x. With dx/dx_t = σ_data·√(1+s²), of a flow √((1−σ)²+σ²), the weight is **σ²**; of a flow
      **s²·(1−σ) = s²/(1+s)**. Both are the rule of the score: x̂0 moves by σ²·∇ₓ log p, of a flow by σ²/(1−σ)·∇ₓ log p.

    So a guidance scale has the same effect whether a model predicts noise, v or x0, and whether or not it is a flow.
    """

    flow: bool = False
    sigma_data: float = 1.0
    noise_scale: float = 1.0

    def ratio(self, sigma: Tensor) -> Tensor:
        """The noise-to-signal ratio; of a flow at most :data:`LARGEST_RATIO`."""
        if self.flow:
            return (self.noise_scale * sigma / (1 - sigma).clamp(min=1e-6)).clamp(max=LARGEST_RATIO)
        return sigma / self.sigma_data

    def weight(self, sigma: Tensor, through_network: bool = False) -> Tensor:
        """What a gradient is multiplied with, for the noise of DDPM (η = 1), to get the shift of x̂0. ``sigma``: any shape."""
        ratio = self.ratio(sigma)
        square = ratio**2 if self.flow else sigma**2
        if not through_network:
            return square / (1 + ratio**2).sqrt()
        return square * (self.noise_scale / (self.noise_scale + ratio)) if self.flow else square


def strength_for(eta: float) -> float:
    """How far guidance moves a sampler with noise η, relative to one with the noise of DDPM: 2/(1+η²), as :class:`~blended_core.sample.DDIM`."""
    return 2 / (1 + eta**2)


@dataclass(frozen=True)
class SamplerNoise:
    """The noise of a sampler: ``eta`` 0 is none, 1 that of DDPM. ``option``: name of the sampler's option that replaces it."""

    eta: float
    option: str = ""

    @property
    def kind(self) -> str:
        """'ode' or 'sde', at its default."""
        return "sde" if self.eta else "ode"

    def of(self, options: Mapping[str, Any]) -> float:
        """η under the options that a sampler was made with, at most 1: more noise does not weaken guidance further."""
        return min(max(float(options.get(self.option, self.eta)), 0.0), 1.0) if self.option else self.eta


_ODE, _SDE, _CHOSEN = SamplerNoise(0.0), SamplerNoise(1.0), SamplerNoise(1.0, "eta")
SAMPLERS: dict[str, SamplerNoise] = {
    **dict.fromkeys(
        (
            "euler", "euler_cfg_pp", "heun", "heunpp2", "exp_heun_2_x0", "dpm_2", "lms", "dpm_fast", "dpmpp_2m", "dpmpp_2m_cfg_pp", "ipndm", "ipndm_v",
            "deis", "res_multistep", "res_multistep_cfg_pp", "gradient_estimation", "gradient_estimation_cfg_pp", "ddim", "uni_pc", "uni_pc_bh2",
        ),
        _ODE,
    ),
    "dpm_adaptive": SamplerNoise(0.0, "eta"),
    **dict.fromkeys(
        (
            "euler_ancestral", "euler_ancestral_cfg_pp", "exp_heun_2_x0_sde", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp",
            "dpmpp_sde", "dpmpp_sde_gpu", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde",
            "dpmpp_3m_sde_gpu", "res_multistep_ancestral", "res_multistep_ancestral_cfg_pp", "seeds_2", "seeds_3",
        ),
        _CHOSEN,
    ),
    **dict.fromkeys(("ddpm", "lcm", "sa_solver", "sa_solver_pece"), _SDE),
    "er_sde": SamplerNoise(1.0, "s_noise"),
}  # fmt: skip
"""ComfyUI's samplers by name. er_sde solves an ODE if its s_noise is 0."""
_OTHER_NAMES = {
    "sample_unipc": "uni_pc",
    "sample_unipc_bh2": "uni_pc_bh2",
    "dpm_fast_function": "dpm_fast",
    "dpm_adaptive_function": "dpm_adaptive",
}


def sampler_noise(function: str) -> SamplerNoise | None:
    """The noise of a sampler by the name of its function ('sample_euler'), or None if it is unknown."""
    return SAMPLERS.get(_OTHER_NAMES.get(function, function.removeprefix("sample_")))


def share_of(sigma: float, percent_to_sigma: Callable[[float], float]) -> float:
    """The share of the noise levels at which a σ lies, 0 for the noisiest; ``percent_to_sigma`` is the inverse, and falls."""
    low, high = 0.0, 1.0
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if percent_to_sigma(middle) > sigma else (low, middle)
    return low


@dataclass(frozen=True, eq=False)
class LinearRGB:
    """A rough picture of latents [B, C, h, w] by one matrix, as ComfyUI shows previews; differentiable, and at the size of the latents.

    Attributes:
        factors: [C, 3]. bias: [3], or None. rearrange: of the latents before that, or None.
    """

    factors: Tensor
    bias: Tensor | None = None
    rearrange: Callable[[Tensor], Tensor] | None = None

    def __call__(self, latents: Tensor) -> Tensor:
        """[B, 3, H, W], nominally −1..1."""
        rows = latents if self.rearrange is None else self.rearrange(latents)
        bias = None if self.bias is None else self.bias.to(rows)
        return torch.nn.functional.linear(rows.movedim(1, -1), self.factors.to(rows).t(), bias).movedim(-1, 1)


@dataclass(frozen=True, eq=False)
class Guide:
    """One prompt that guides a model.

    Attributes:
        options: of guidance; their ``gradient`` says whether it passes the network. ``scale`` replaces theirs.
        clip, prompt, perceptual: what the losses need.
        decode: x̂0 → picture, differentiable. cell: side, in pixels of the picture at full size, of one value of x̂0.
        mask: (height, width) of the picture → the part that CLIP sees [B or 1, 1, H, W]; None: all of it.
        source: the picture whose background is kept [B or 1, 3, H, W] in −1..1, where the options ask for it.
        strength: of the sampler (:func:`strength_for`).
    """

    options: GuidanceOptions
    clip: ClipModel
    prompt: Prompt
    scale: float
    decode: Callable[[Tensor], Tensor]
    perceptual: PerceptualDistance | None = None
    mask: Callable[[tuple[int, int]], Tensor] | None = None
    source: Callable[[], Tensor] | None = None
    strength: float = 1.0
    cell: int = 1

    @property
    def through_network(self) -> bool:
        """Whether the gradient passes the network that predicts x̂0."""
        return self.options.gradient == "unet"

    @property
    def limited(self) -> bool:
        """Whether the options differ between noise levels."""
        return self.options.start > 0 or self.options.end < 1 or self.options.early_views > 0

    def guidance(self, options: GuidanceOptions) -> Guidance:
        """Of a step with these options."""
        losses = losses_from(options, self.clip, self.perceptual, self.prompt, self.scale if options.uses_clip else 0.0)
        return Guidance(tuple(losses), self.through_network, self.decode, options.reference_size, options.clamp, self.cell)


@dataclass(eq=False)
class ShiftedEstimate:
    """The shifts of x̂0 in one run of a sampler. The random views of a call depend on the seed and the number of the call.

    Attributes:
        guides: their shifts add; each takes its gradient at x̂0 as the model predicted it.
        parameterization: of the model.
        random: of the views. percent_to_sigma: share of the noise levels → σ.
        context: where the losses are computed.
        calls: number of calls so far. rows: images at once that memory allowed. broken: number of gradients that were not finite, a tensor.
    """

    guides: Sequence[Guide]
    parameterization: Parameterization
    random: RandomSource
    percent_to_sigma: Callable[[float], float]
    context: DeviceContext = field(default_factory=DeviceContext)
    calls: int = 0
    rows: int | None = None
    broken: Tensor | int = 0
    _active: tuple[float, list[tuple[Guide, GuidanceOptions]]] = (-1.0, [])
    _masks: dict[int, Tensor] = field(default_factory=dict)
    _sources: dict[int, Tensor] = field(default_factory=dict)

    def active(self, sigma: Tensor) -> list[tuple[Guide, GuidanceOptions]]:
        """The guides that act at σ [B], with their options there."""
        level = float(sigma.max())
        if level == self._active[0]:
            return self._active[1]
        self._active = level, self._active_at(level)
        return self._active[1]

    def _active_at(self, level: float) -> list[tuple[Guide, GuidanceOptions]]:
        if not level > 0:
            return []
        limited = any(guide.limited for guide in self.guides)
        share = share_of(level, self.percent_to_sigma) if limited else 0.0
        found = [(guide, guide.options.at_share(share) if guide.limited else guide.options) for guide in self.guides]
        return [(guide, options) for guide, options in found if options is not None and options.has_losses]

    def needs_graph(self, sigma: Tensor) -> bool:
        """Whether x̂0 at σ must be computed with gradients."""
        return any(guide.through_network for guide, _ in self.active(sigma))

    def __call__(self, x0: Tensor, sigma: Tensor, x: Tensor | None = None) -> Tensor | None:
        """The shift of x̂0, or None where nothing guides.

        Args:
            x0: [B, C, h, w], or [B, C, 1, h, w]; not an inference tensor.
            sigma: [B]. x: the leaf that ``x0`` was computed from with gradients, where :meth:`needs_graph` asks for it.
        """
        call, active = self.calls, self.active(sigma)
        self.calls += 1
        shift: Tensor | None = None
        leaves = sum(guide.through_network for guide, _ in active)
        for guide, options in active:
            leaves -= guide.through_network
            gradient = self._gradient(guide, options, x0, call, x if guide.through_network else None, keep_graph=leaves > 0)
            weight = guide.strength * self.parameterization.weight(sigma.float(), guide.through_network)
            part = gradient.to(x0.device) * weight.to(x0.device).view(-1, *[1] * (gradient.ndim - 1))
            shift = part if shift is None else shift + part
        return shift

    def _gradient(self, guide: Guide, options: GuidanceOptions, x0: Tensor, call: int, x: Tensor | None, keep_graph: bool) -> Tensor:
        """Of minus the losses of a guide, in the shape of ``x0``."""
        with torch.set_grad_enabled(x is not None):
            pictures = (x0.squeeze(2) if x0.ndim == 5 else x0).to(self.context.device, torch.float32)
        guidance, mask = guide.guidance(options), self._mask(guide, pictures.detach())
        source = self._source(guide) if options.needs_perceptual else None

        def of(part: slice, x: Tensor | None) -> LossGradient:
            images = range(len(pictures))[part]
            own = mask if len(mask) == 1 else mask[part]
            kept = source if source is None or len(source) == 1 else source[part]
            step = StepInput(pictures[part].detach(), call, None, images, self.random, own, kept)
            return guidance.gradient(pictures[part], step, x, keep_graph)

        if x is not None:
            with torch.enable_grad():
                found = [of(slice(None), x)]
        else:
            found, self.rows = run_in_parts(
                lambda rows: [of(slice(first, first + rows), None) for first in range(0, len(pictures), rows)],
                min(self.rows or len(pictures), len(pictures)), self.context, "the gradient of guidance is computed",
            )  # fmt: skip
        self.broken = self.broken + sum(part.broken for part in found)
        gradient = torch.cat([part.gradient for part in found])
        return gradient if gradient.ndim == x0.ndim else gradient.unsqueeze(2)

    def _source(self, guide: Guide) -> Tensor | None:
        """The picture whose background is kept, decoded once in a run."""
        if guide.source is None:
            return None
        key = id(guide)
        if key not in self._sources:
            self._sources[key] = guide.source().to(self.context.device)
        return self._sources[key]

    def _mask(self, guide: Guide, pictures: Tensor) -> Tensor:
        """What CLIP sees, at the size of the decoded picture, which only decoding tells."""
        key = id(guide)
        if key not in self._masks:
            height, width = guide.decode(pictures[:1]).shape[-2:]
            mask = torch.ones(1, 1, height, width) if guide.mask is None else guide.mask((height, width))
            self._masks[key] = mask.to(self.context.device)
        return self._masks[key]
