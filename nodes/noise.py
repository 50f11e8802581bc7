"""Blended Noise (MODEL): Algorithm 2's background in the samplers of ComfyUI."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from torch import Tensor

from ..blended_core.background import AUTO, Background
from ..blended_core.errors import BlendedWarning
from ..blended_core.mask import blend
from ..blended_core.random import MAX_SEED, SeededRandom
from . import inputs
from .runtime import library_scope

NAME = "Blended Noise (MODEL)"
KEY = "blended_diffusion_noise"
MASK_FUNCTION = "denoise_mask_function"
"""Where Differential Diffusion puts what makes the mask of a level. It has the last word on the mask, wherever it is in the chain."""
NETWORK = ("noise", "latent_image", "inner_model")
"""What core's network for samplers with a noise mask has."""
MEMORYLESS = ("sample_euler", "sample_euler_ancestral", "sample_ddpm", "sample_lcm")
"""Samplers (``ddim`` is the first) that make a step of x and x̂0 alone, as the pack's own do. Others remember earlier calls, which their x must fit."""


class BlendedNoise(io.ComfyNode):
    """Lets samplers blend with a background that is noised afresh at every level."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendedNoiseModel",
            display_name=NAME,
            category=inputs.CATEGORY,
            description=(
                "Where a LATENT has a noise mask, KSampler blends the source with one fixed noise at all levels. With this patch it blends as Algorithm 2 of "
                "Blended Diffusion does: the source is noised afresh at every level, darker pixels of the mask are edited from later levels on, and a thin mask is "
                "shrunk step by step. For any MODEL and any sampler."
            ),
            search_aliases=[
                "inpaint noise",
                "noise mask",
                "set latent noise mask",
                "progressive mask shrinking",
                "soft mask",
                "blended latent diffusion",
            ],
            inputs=[
                io.Model.Input("model", tooltip="Any diffusion model. It is not changed; the patch is on a copy of its settings."),
                io.Int.Input(
                    "shrink",
                    default=AUTO,
                    min=AUTO,
                    max=16,
                    optional=True,
                    tooltip="How often the mask is grown before the first step; it shrinks to its own size in as many stages (progressive mask shrinking). "
                    "3: grown by 3, 2 and 1 latent pixels on each side, then the mask itself. 0: off. -1: 3 for a thin mask, else off.",
                ),
            ],
            outputs=[io.Model.Output("model", display_name="model", tooltip="The patched MODEL, for KSampler or a guider.")],
        )

    @classmethod
    def execute(cls, model: Any, shrink: int = AUTO) -> io.NodeOutput:
        patched = model.clone()
        # A patch replaces another one of its kind.
        patched.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, functools.partial(sample_blended, shrink))
        return io.NodeOutput(patched)


def sample_blended(
    shrink: int,
    executor: Any,
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    denoise_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """A wrapper of a guider's whole run. What it knows ends with the run; the MODEL holds the number of dilations alone."""
    seed = kwargs.get("seed", args[2] if len(args) > 2 else None)
    background = background_of(shrink, noise, sampler, sigmas, denoise_mask, seed)
    if background is None:
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
    if shrink > 0 and MASK_FUNCTION in executor.class_obj.model_options:
        tell(f"shrink is {shrink} at {NAME} and has no effect, because Differential Diffusion sets the mask of each level.")
    blended = copy.copy(sampler)
    blended.sampler_function = blending(sampler.sampler_function, background)
    samples = executor(noise, latent_image, blended, sigmas, denoise_mask, *args, **kwargs)
    return background.restored(samples, latent_image)


def tell(text: str) -> None:
    """Writes a warning to ComfyUI's log, through the scope of the node."""
    with library_scope(NAME):
        warnings.warn(BlendedWarning(text), stacklevel=2)


def background_of(
    shrink: int, noise: Tensor, sampler: Any, sigmas: Tensor, denoise_mask: Tensor | None, seed: int | None
) -> Background | None:
    """The background of a run, or None, with the reason in the log, where the sampler runs as it is."""
    reason = ""
    if denoise_mask is None:
        reason = "the LATENT has no noise mask; set one with Set Latent Noise Mask"
    elif not callable(getattr(sampler, "sampler_function", None)):
        reason = f"the sampler {type(sampler).__name__} has its own sampling loop; choose a sampler of KSampler"
    elif len(sigmas) < 2:
        reason = "the run has no step; give it two noise levels or more"
    elif not bool(noise.any()):
        reason = (
            "the run adds no noise, so it continues a noisy LATENT whose source is not known; connect the patch to the first sampler alone"
        )
    if reason or denoise_mask is None:
        tell(f"{NAME} has no effect: {reason}.")
        return None
    with library_scope(NAME):
        return Background.of(denoise_mask.clone(), [float(sigma) for sigma in sigmas], SeededRandom((seed or 0) & MAX_SEED), shrink)


def blending(sampler_function: Callable[..., Tensor], background: Background) -> Callable[..., Tensor]:
    """A sampler whose network blends with this background."""

    @functools.wraps(sampler_function)
    def sample(network: Any, *args: Any, **kwargs: Any) -> Tensor:
        if missing := [name for name in NETWORK if not hasattr(network, name)]:
            lacking = " and no ".join(missing)
            tell(f"{NAME} has no effect: the sampler's network {type(network).__name__} has no {lacking}; choose a sampler of KSampler.")
            return sampler_function(network, *args, **kwargs)
        blending_network = BlendingNetwork(network, background, getattr(sampler_function, "__name__", "") in MEMORYLESS)
        return sampler_function(blending_network, *args, **kwargs)

    return sample


class BlendingNetwork:
    """The network that core gives its samplers (``KSamplerX0Inpaint``), with other noise and another mask in each call.

    Samplers read further attributes of that network, which are its own. ``in_place``: the sampler's own x is blended too, as in Algorithm 2. Else the
    pixels that a gray mask releases go on with the noise that the run started with.
    """

    def __init__(self, network: Any, background: Background, in_place: bool) -> None:
        self._network, self._background, self._in_place = network, background, in_place
        self._start = getattr(network, "noise", None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def __call__(
        self, x: Tensor, sigma: Tensor, denoise_mask: Tensor | None = None, model_options: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """x̂0 at σ, as core makes it."""
        options = model_options or {}
        if denoise_mask is None:
            return self._network(x, sigma, denoise_mask=denoise_mask, model_options=options, **kwargs)
        network, level = self._network, float(sigma.flatten()[0])
        noise = self._background.noise(level, x.shape)
        network.noise = self._start if noise is None else noise.to(self._start)
        if MASK_FUNCTION in options:
            return network(x, sigma, denoise_mask=denoise_mask, model_options=options, **kwargs)
        before, after = (weights.to(x) for weights in (self._background.weights_before(level), self._background.weights_after(level)))
        if noise is not None:
            noised = network.inner_model.inner_model.scale_latent_inpaint(
                x=x, sigma=sigma, noise=network.noise, latent_image=network.latent_image, denoise_mask=before
            )
            blended = blend(x, noised, before)
            # Some models start from the source image itself.
            x = x.copy_(blended) if self._in_place and x is not network.latent_image else blended
        # Core blends both x and x̂0 with the mask that it is given; a mask that shrinks now is larger for x.
        x0 = network(x, sigma, denoise_mask=torch.maximum(before, after), model_options=options, **kwargs)
        return blend(x0, network.latent_image, after) if bool((before > after).any()) else x0
