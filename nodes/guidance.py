"""CLIP Guidance (MODEL): guidance by CLIP for any MODEL and every sampler.

The node puts wrappers on a copy of the MODEL. What a run needs lives in the options of that run alone, so two branches of one MODEL do not see each
other, and nothing is left after a run that failed.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import comfy.model_management as mm
import comfy.model_sampling as ms
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from torch import Tensor

from ..blended_core.background import empty_noise_mask
from ..blended_core.denoiser import DiffusionModel
from ..blended_core.errors import BlendedError, BlendedWarning
from ..blended_core.mask import EditMask
from ..blended_core.memory import values_per_image
from ..blended_core.options import GuidanceOptions
from ..blended_core.random import MAX_SEED, SeededRandom
from ..blended_core.shift import UNKNOWN_ETA, Guide, LinearRGB, Parameterization, ShiftedEstimate, sampler_noise, strength_for
from . import inputs
from .images import from_mask
from .inputs import row_indices
from .latent import as_mask_batch, mask_rule, scale_mask, shape_of, stretch_mask
from .memory import LoadedGuidance, LoadedPerceptual, LoadedPrompt, device_context, heal, load_rest, with_patchers
from .prompt import AUTOMATIC_SCALE
from .runtime import library_scope

NAME = "CLIP Guidance (MODEL)"
KEY = "blended_diffusion_guidance"
"""Of the wrappers and additional models on the MODEL, and of a run in its options."""
KINDS = {"auto": None, "ode": 0.0, "sde": 1.0}
"""Kind of the sampler → its noise η; None: by its name."""
USUAL_CELL = 8
"""Image pixels along the side of a latent pixel, where neither the MODEL nor a VAE tells, as in versions of ComfyUI before 0.9."""
BACKWARD = 3
"""Memory of a pass forward and backward, relative to what core estimates for the pass forward alone. Measured for core's AutoencoderKL: 2.7."""


class CLIPGuidanceModel(io.ComfyNode):
    """Guidance by CLIP for a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendedCLIPGuidanceModel",
            display_name=NAME,
            category=inputs.CATEGORY,
            description=(
                "Guides any MODEL (SDXL, Flux, Qwen-Image, or a DDPM as MODEL) toward a prompt by CLIP, inside the mask. Works with every sampler, and together "
                "with cfg, LoRA, ControlNet and other patches. Several of these nodes in a row add up."
            ),
            search_aliases=[
                "CLIP guided diffusion",
                "guide KSampler",
                "model patch",
                "guidance for SDXL",
                "guidance for Flux",
                "universal guidance",
                "CLIP loss",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that the sampler uses."),
                inputs.PROMPT.Input(
                    "prompt",
                    tooltip="The prompt, from Encode Prompt. It may differ from the text that the model itself gets. Empty: no guidance.",
                ),
                inputs.from_option(
                    GuidanceOptions,
                    "scale",
                    default=AUTOMATIC_SCALE,
                    tooltip="Weight of the CLIP loss. Too low: the result ignores the prompt. Too high: glaring colors and patterns that only CLIP recognizes. "
                    "-1: the scale in options, else the scale that a DDPM recommends, else 1000.",
                ),
                io.Combo.Input(
                    "gradient",
                    options=["x0", "model"],
                    default="x0",
                    optional=True,
                    tooltip="Where the gradient is taken. x0: at the model's prediction of the clean image; fast, little memory. model: through the model; "
                    "several times the time and memory of a step. Replaces gradient in options.",
                ),
                io.Combo.Input(
                    "sampler_kind",
                    options=list(KINDS),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="ode: the sampler adds no noise (euler, dpmpp_2m), and is guided twice as strongly as sde (euler_ancestral, dpmpp_2m_sde), so that both follow "
                    "the prompt alike. auto: by the name of the sampler and its eta.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="The part of the image that CLIP sees: one mask, or one per image. Unconnected: the noise mask of the LATENT, else the whole image.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The VAE of the model, through which CLIP sees the image at full size. Unconnected: a rough picture at the size of the latent, which is "
                    "faster and needs less memory. Not needed for a DDPM as MODEL.",
                ),
                inputs.GUIDANCE.Input("options", optional=True, tooltip="From Guidance Options. Unconnected: the defaults of that node."),
            ],
            outputs=[io.Model.Output("model", display_name="model", tooltip="The guided MODEL, for KSampler and other samplers.")],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        prompt: LoadedPrompt,
        scale: float = AUTOMATIC_SCALE,
        gradient: str = "x0",
        sampler_kind: str = "auto",
        mask: Tensor | None = None,
        vae: Any = None,
        options: LoadedGuidance | None = None,
    ) -> io.NodeOutput:
        with library_scope(NAME):
            if not isinstance(prompt, LoadedPrompt):
                raise BlendedError(
                    f"the prompt is a {type(prompt).__name__}; connect Encode Prompt, with the CLIP of Load CLIP (open_clip). The CLIP of a "
                    "checkpoint is a text encoder and cannot see images."
                )
            chosen = options.options if options is not None else GuidanceOptions()
            chosen = replace(chosen, scale=chosen.scale if scale < 0 else scale, gradient="unet" if gradient == "model" else "x0")
            decoder = decoder_of(model, vae)
            if not len(prompt.prompt):
                return io.NodeOutput(model.clone())
            perceptual = options.perceptual if options is not None else None
            given = None if mask is None else from_mask(mask)
            return io.NodeOutput(guided(model, ModelGuidance(prompt, chosen, perceptual, KINDS[sampler_kind], given, decoder)))


@dataclass(frozen=True, eq=False)
class Decoder:
    """x̂0 of a MODEL → picture [B, 3, H, W], nominally −1..1; differentiable.

    ``patcher`` holds the network of ``vae``; without a VAE it is ``linear`` that makes the picture.
    """

    latent_format: Any
    vae: Any = None
    patcher: ModelPatcher | None = None
    linear: LinearRGB | None = None

    def __call__(self, x0: Tensor) -> Tensor:
        if self.patcher is None:
            assert self.linear is not None
            return self.linear(x0)
        video = getattr(self.vae, "latent_dim", 2) == 3
        latents = self.latent_format.process_out(x0.unsqueeze(2) if self.latent_format.latent_dimensions == 3 else x0)
        latents = latents.to(self.patcher.load_device, self.vae.vae_dtype)
        if video != (latents.ndim == 5):
            latents = latents.unsqueeze(2) if video else latents[:, :, 0]
        values: Tensor = self.patcher.model.decode(latents).to(x0)
        # What turns the network's values into 0..1 is usually (v + 1)/2 with a clamp, which would stop gradients. Two of its values tell the rest.
        at_zero, at_half = self.vae.process_output(torch.tensor([0.0, 0.5])).tolist()
        pictures: Tensor = values * (4 * (at_half - at_zero)) + (2 * at_zero - 1)
        return pictures[:, :, 0] if pictures.ndim == 5 else pictures

    @property
    def cell(self) -> int:
        """Side in image pixels of one value of x̂0."""
        of_format = getattr(self.latent_format, "spacial_downscale_ratio", None)
        of_vae = self.vae.spacial_compression_decode() if self.vae is not None else None
        return next((int(ratio) for ratio in (of_format, of_vae) if isinstance(ratio, int)), USUAL_CELL)

    def bytes_for(self, shape: Sequence[int]) -> int:
        """Estimate of the memory that a latent of this shape takes, forward and backward."""
        estimate = getattr(self.vae, "memory_used_decode", None)
        if self.patcher is None or estimate is None:
            return 0
        if self.vae.latent_dim == 3 and len(shape) == 4:
            shape = (*shape[:2], 1, *shape[2:])
        # Core's estimate is that of one image; all images are decoded at once.
        return BACKWARD * shape[0] * int(estimate(shape, self.vae.vae_dtype))


def decoder_of(model: ModelPatcher, vae: Any) -> Decoder:
    """The decoder for a MODEL: its VAE, or without one the matrix that makes its previews.

    Raises:
        BlendedError: if the VAE cannot be that of the MODEL, or there is neither.
    """
    latent_format = copy.copy(model.get_model_object("latent_format"))
    for name, value in vars(latent_format).items():
        if isinstance(value, Tensor):  # mean and deviation of the latents, made in inference mode
            setattr(latent_format, name, value.clone())
    kind = type(latent_format).__name__
    channels, dimensions = latent_format.latent_channels, getattr(latent_format, "latent_dimensions", 2)
    if dimensions == 1:
        raise BlendedError(f"the MODEL makes audio (its latents are {kind}), and CLIP sees images; connect a MODEL that makes images.")
    if vae is None:
        factors = latent_format.latent_rgb_factors
        if factors is None:
            raise BlendedError(
                f"ComfyUI has no preview colors for the latents of this MODEL ({kind}), so CLIP cannot see them; connect the vae."
            )
        bias, rearrange = (getattr(latent_format, name, None) for name in ("latent_rgb_factors_bias", "latent_rgb_factors_reshape"))
        linear = LinearRGB(torch.tensor(factors), None if bias is None else torch.tensor(bias), rearrange)
        return Decoder(latent_format, linear=linear)
    if getattr(vae, "first_stage_model", None) is None or not hasattr(vae, "patcher"):
        raise BlendedError("the VAE is empty, because the checkpoint contains none; connect the VAE of the MODEL, from Load VAE.")
    found, of_vae = getattr(vae, "latent_channels", channels), getattr(vae, "latent_dim", 2)
    if of_vae == 1 or getattr(vae, "output_channels", 3) != 3:
        raise BlendedError("the VAE makes no RGB images; connect the VAE of the MODEL.")
    if found != channels:
        raise BlendedError(
            f"the VAE is for latents of {found} channels and the MODEL has {channels} ({kind}); connect the VAE of the MODEL."
        )
    ratio, own = vae.spacial_compression_decode(), getattr(latent_format, "spacial_downscale_ratio", None)
    if own is not None and isinstance(ratio, int) and ratio != own:
        raise BlendedError(
            f"a latent pixel is {ratio}×{ratio} image pixels for the VAE and {own}×{own} for the MODEL ({kind}); connect the VAE of the MODEL."
        )
    return Decoder(latent_format, vae, whole(vae.patcher, "vae"))


def whole(patcher: ModelPatcher, name: str) -> ModelPatcher:
    """A patcher that keeps the weights of its network in place.

    A dynamic one streams them through one buffer, which is overwritten before the backward pass reads it.
    """
    if not getattr(patcher, "is_dynamic", bool)():
        return patcher
    try:
        return patcher.get_non_dynamic_delegate()
    except RuntimeError:
        raise BlendedError(
            f"gradients cannot pass the {name} while ComfyUI streams its weights; load it with a loader node of ComfyUI, or start ComfyUI with "
            "--disable-dynamic-vram."
        ) from None


@dataclass(frozen=True, eq=False)
class ModelGuidance:
    """What one node adds to a MODEL.

    Attributes:
        options: with the scale and the gradient of the node.
        eta: noise of the sampler, or None: by its name.
        mask: [M, 1, H, W] over the image, or None.
    """

    prompt: LoadedPrompt
    options: GuidanceOptions
    perceptual: LoadedPerceptual | None
    eta: float | None
    mask: Tensor | None
    decoder: Decoder

    @property
    def patchers(self) -> list[ModelPatcher]:
        """Of the networks that it needs besides the MODEL."""
        found = [self.prompt.clip.patcher, self.decoder.patcher, self.perceptual.patcher if self.perceptual is not None else None]
        return [patcher for patcher in found if patcher is not None]

    def bytes_for(self, shape: Sequence[int]) -> int:
        """Estimate of the memory for a LATENT of this shape, beside the weights."""
        clip, options = self.prompt.clip.model, self.options
        views = max(options.views, options.early_views)
        views = min(options.view_chunk or views, views)
        return shape[0] * views * clip.image_dtype.itemsize * values_per_image(clip) + self.decoder.bytes_for(shape)

    def guide(self, scale: float, noise_mask: Tensor | None, latent_image: Tensor) -> Guide:
        """For one run. ``noise_mask`` [B, 1, h, w], or None; ``latent_image`` [B, C, h, w] as the model holds it."""

        values = self.mask if self.mask is not None else noise_mask
        if self.mask is not None:
            row_indices(len(self.mask), len(latent_image), "masks")

        def mask(values: Tensor, size: tuple[int, int]) -> Tensor:
            fitted = stretch_mask(values, size) if self.mask is None else scale_mask(values, size)
            soft = bool(((values > 0) & (values < 1)).any())
            return EditMask.of(fitted, mask_rule(soft)).for_clip()

        def source() -> Tensor:
            if not latent_image.any():
                raise BlendedError(
                    "background_scale is above 0, but the LATENT is empty, so there is no background to keep; connect VAE Encode to the sampler.",
                    option="background_scale",
                )
            return self.decoder(latent_image)

        seen = None if values is None else partial(mask, values)
        perceptual = self.perceptual.model if self.perceptual is not None else None
        return Guide(
            self.options, self.prompt.clip.model, self.prompt.prompt, scale, self.decoder, perceptual, seen, source, cell=self.decoder.cell
        )


def guided(model: ModelPatcher, guidance: ModelGuidance) -> ModelPatcher:
    """A copy of a MODEL with one guidance more."""
    if guidance.options.gradient == "unet":
        model = whole(model, "model")
    patched = model.clone()
    before = [wrapper.__self__ for wrapper in patched.get_wrappers(WrappersMP.PREDICT_NOISE, KEY)]
    parts = (*(part for patch in before for part in patch.parts), guidance)
    patch = GuidancePatch(parts)
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, patch.outer_sample),
        (WrappersMP.PREPARE_SAMPLING, patch.prepare_sampling),
        (WrappersMP.PREDICT_NOISE, patch.predict_noise),
    ):
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    patched.set_additional_models(KEY, patch.patchers)
    return patched


class GuidancePatch:
    """The wrappers of all guidances on one MODEL. They are together, so that each takes its gradient at the same x̂0 and their order does not matter."""

    def __init__(self, parts: tuple[ModelGuidance, ...]) -> None:
        self.parts = parts

    @property
    def patchers(self) -> list[ModelPatcher]:
        """Of the networks besides the MODEL."""
        return list(dict.fromkeys(patcher for part in self.parts for patcher in part.patchers))

    @property
    def through_model(self) -> bool:
        """Whether any gradient passes the MODEL."""
        return any(part.options.gradient == "unet" for part in self.parts)

    def prepare_sampling(self, executor: Any, model: ModelPatcher, noise_shape: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        """Loads the networks as a whole, tells the manager what a step needs beside the model, and lets gradients pass them."""
        needed = sum(part.bytes_for(noise_shape) for part in self.parts)
        if self.through_model:
            needed += (BACKWARD - 1) * int(model.memory_required([2 * noise_shape[0], *noise_shape[1:]]))
            if "force_full_load" in kwargs:
                kwargs["force_full_load"] = True
        with library_scope(NAME):
            mm.load_models_gpu(self.patchers, memory_required=needed, force_full_load=True)
        prepared = executor(model, noise_shape, *args, **kwargs)
        with library_scope(NAME):
            loaded = [model, *prepared[2]]
            for patcher in self.patchers:
                load_rest(patcher)
                heal(patcher.model)
            if self.through_model:
                load_rest(model)
                for patcher in loaded:
                    heal(patcher.model)
            in_use = [entry for entry in mm.current_loaded_models if any(entry.model.is_clone(patcher) for patcher in loaded)]
            mm.free_memory(needed, model.load_device, keep_loaded=in_use)
        return prepared

    def outer_sample(
        self, executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, denoise_mask: Tensor | None = None,
        callback: Any = None, disable_pbar: bool = False, seed: int | None = None, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Keeps what a run needs in the options of that run."""
        guider = executor.class_obj
        with library_scope(NAME):
            run = self.run(guider.model_patcher, noise, latent_image, sampler, denoise_mask, seed or 0, kwargs.get("latent_shapes"))
        guider.model_options[KEY] = run
        try:
            result = executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, *args, **kwargs)
        finally:
            del guider.model_options[KEY]
        with library_scope(NAME):
            if broken := int(run.broken):
                warnings.warn(
                    BlendedWarning(
                        f"the gradient of CLIP was not finite at {broken} of {run.calls * len(noise)} images of all steps, and was left out there; a lower "
                        "guidance scale, or the model in fp32, may help.",
                        option="scale",
                    ),
                    stacklevel=1,
                )
        return result

    def run(
        self,
        model: ModelPatcher,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        denoise_mask: Tensor | None,
        seed: int,
        shapes: Any = None,
    ) -> ShiftedEstimate:
        """The guidance of one run of a sampler.

        Raises:
            BlendedError: for latents that are not those of images, or a model without noise levels.
        """
        check_latent(noise, model.get_model_object("latent_format"), shapes)
        sampling = model.get_model_object("model_sampling")
        latent_image = model.model.process_latent_in(latent_image) if latent_image.any() else latent_image
        noise_mask = None
        if denoise_mask is not None:
            noise_mask = as_mask_batch(denoise_mask[:, 0] if denoise_mask.ndim == 4 else denoise_mask[:, 0, 0])
            if not EditMask.of(noise_mask, "soft").inside.any():
                raise empty_noise_mask(noise_mask)
            noise_mask = None if bool((noise_mask == 1).all()) else noise_mask
        etas = {part.eta for part in self.parts}
        eta = eta_of(sampler) if None in etas else 0.0
        guides = []
        for part in self.parts:
            ddpm = getattr(model.model, "ddpm", None)
            recommended = (ddpm.guidance_scale, ddpm.image_size) if isinstance(ddpm, DiffusionModel) else (None, 0)
            guide = part.guide(part.options.scale_for(*recommended), noise_mask, image_rows(latent_image))
            guides.append(replace(guide, strength=strength_for(eta if part.eta is None else part.eta)))
        context = with_patchers(device_context("fp32"), [model, *self.patchers])
        return ShiftedEstimate(
            guides, parameterization(sampling), SeededRandom(seed & MAX_SEED), sampling.percent_to_sigma, context,
        )  # fmt: skip

    def predict_noise(self, executor: Any, x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Shifts x̂0 of the guider, after everything else that changes it. Of several (LanPaint returns two), each is shifted alike."""
        guider = executor.class_obj
        run: ShiftedEstimate | None = guider.model_options.get(KEY)
        if run is None:
            return executor(x, timestep, *args, **kwargs)
        mm.throw_exception_if_processing_interrupted()
        with torch.inference_mode(False):
            sigma = timestep.detach().clone()
        if run.needs_graph(sigma):
            # Until the gradient is taken, because networks change in place what their own backward pass reads.
            with torch.inference_mode(False), training_kernels(), torch.autograd.graph.allow_mutation_on_saved_tensors():
                free_conditions(guider.conds)
                leaf = x.detach().clone().requires_grad_()
                with torch.enable_grad():
                    result = executor(leaf, sigma, *args, **kwargs)
                estimates = list(result) if isinstance(result, (tuple, list)) else [result]
                with library_scope(NAME):
                    shift = run(estimates[0], sigma, leaf)
        else:
            result = executor(x, timestep, *args, **kwargs)
            estimates = list(result) if isinstance(result, (tuple, list)) else [result]
            with library_scope(NAME):
                shift = run(estimates[0].detach().clone(), sigma)
        estimates = [estimate.detach() for estimate in estimates]
        if shift is not None:
            estimates = [estimate + shift.to(estimate) for estimate in estimates]
        if isinstance(result, list):
            return estimates
        return tuple(estimates) if isinstance(result, tuple) else estimates[0]


@contextlib.contextmanager
def training_kernels() -> Iterator[None]:
    """Lets core compute with operations that gradients can pass: some of its kernels for transformers (Flux, Qwen-Image, Wan) have none."""
    before = mm.in_training
    mm.in_training = True
    try:
        yield
    finally:
        mm.in_training = before


def check_latent(noise: Tensor, latent_format: Any, shapes: Any = None) -> None:
    """Raises BlendedError unless the samples are those of images, with the channels of the model."""
    if shapes is not None and len(shapes) > 1:
        raise BlendedError(
            f"the LATENT holds {len(shapes)} streams (video with audio), and CLIP sees single images; use {NAME} with a MODEL that makes images."
        )
    if noise.ndim == 5 and noise.shape[2] > 1:
        raise BlendedError(
            f"the LATENT is a video of {noise.shape[2]} latent frames, and CLIP sees single images; make a LATENT of one frame."
        )
    if noise.ndim not in (4, 5):
        raise BlendedError(
            f"the LATENT has shape {shape_of(noise)}, which is not that of images (audio, for example); connect a LATENT of images."
        )
    if noise.shape[1] != latent_format.latent_channels:
        raise BlendedError(
            f"the LATENT has {noise.shape[1]} channels and the MODEL takes {latent_format.latent_channels} ({type(latent_format).__name__}); connect VAE Encode "
            "with the VAE of the MODEL."
        )


def image_rows(samples: Tensor) -> Tensor:
    """[B, C, (1,) h, w] → [B, C, h, w], outside of inference mode."""
    return (samples[:, :, 0] if samples.ndim == 5 else samples).detach().clone()


def parameterization(sampling: Any) -> Parameterization:
    """How a model's samples contain noise. Raises BlendedError if they contain none."""
    if isinstance(sampling, (ms.IMG_TO_IMG, getattr(ms, "IMG_TO_IMG_FLOW", ms.IMG_TO_IMG))) or not hasattr(sampling, "percent_to_sigma"):
        raise BlendedError(
            "the MODEL turns one image into another without noise levels, so there is nothing to guide; connect a diffusion model."
        )
    if isinstance(sampling, ms.CONST):
        return Parameterization(flow=True, noise_scale=float(getattr(sampling, "noise_scale", 1.0)))
    return Parameterization(sigma_data=float(getattr(sampling, "sigma_data", 1.0)))


def eta_of(sampler: Any) -> float:
    """The noise of a sampler by its name and options."""
    function = getattr(sampler, "sampler_function", None)
    name = getattr(getattr(function, "func", function), "__name__", type(sampler).__name__)
    noise = sampler_noise(name)
    if noise is not None:
        return noise.of(getattr(sampler, "extra_options", {}))
    warnings.warn(
        BlendedWarning(
            f"the sampler {name} is unknown, so {NAME} takes it for one that adds noise (sde). If it adds none, choose sampler_kind ode, which guides twice "
            "as strongly."
        ),
        stacklevel=1,
    )
    return UNKNOWN_ETA


def free_conditions(conds: Any) -> None:
    """Replaces what the conditionings of a run give to the network by copies that gradients can pass."""
    for conditions in conds.values():
        for condition in conditions:
            for holder in condition.get("model_conds", {}).values():
                values = getattr(holder, "cond", None)
                if isinstance(values, Tensor) and values.is_inference():
                    holder.cond = values.clone()
                elif isinstance(values, list):
                    holder.cond = [v.clone() if isinstance(v, Tensor) and v.is_inference() else v for v in values]
