"""DDPM as MODEL: a diffusion model as ComfyUI's own kind, for KSampler and every other node that takes a MODEL."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import comfy.conds
import comfy.model_management as mm
import comfy.model_sampling
import torch
from comfy.latent_formats import LatentFormat
from comfy.model_base import BaseModel, ModelType
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from comfy.sd import VAE
from comfy.supported_models_base import BASE
from comfy_api.latest import io
from torch import Tensor, nn

from ..blended_core.denoiser import DiffusionModel
from ..blended_core.device import DeviceContext
from ..blended_core.diffusion import DiffusionConfig
from ..blended_core.errors import BlendedError, BlendedWarning
from ..blended_core.memory import memory_needed
from . import inputs
from .images import sample_to_levels_
from .memory import LoadedDDPM, load_rest
from .runtime import library_scope

NAME = "DDPM as MODEL"
KEY = "blended_diffusion_ddpm"
"""Of the wrappers on the MODEL."""
CLASS_KEY = "blended_diffusion_class"
"""In the options of a CONDITIONING: 'zero' or the number of a class."""
PREDICTED = {"eps": comfy.model_sampling.EPS, "v": comfy.model_sampling.V_PREDICTION, "x0": comfy.model_sampling.X0}
"""What a network predicts → how core makes x̂0 from it. All three scale the input to variance 1."""


class PixelFormat(LatentFormat):
    """A LATENT that is the image itself: [B, 3, H, W] in −1..1."""

    latent_channels = 3
    spacial_downscale_ratio = 1

    def __init__(self) -> None:
        self.latent_rgb_factors = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


class CoreConfig(BASE):
    """What core asks of a kind of model; the network is made elsewhere."""

    latent_format = PixelFormat
    unet_extra_config: ClassVar[dict[str, Any]] = {}


class Levels(comfy.model_sampling.ModelSamplingDiscrete):
    """The noise levels of a process: every step of it, as the σ of x = x0 + σ·noise."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.num_timesteps = config.steps
        self.set_sigmas(torch.from_numpy(config.respaced(config.steps).sqrt_recipm1_alphas_cumprod))

    def sigma(self, timestep: Tensor) -> Tensor:
        """The level of the nearest step, because the network knows no others: scheduler 'normal' then gives the levels of the pack's own respacing."""
        steps = timestep.float().round().clamp(0, self.num_timesteps - 1).long()
        levels: Tensor = self.sigmas[steps.to(self.sigmas.device)]
        return levels.to(timestep.device)

    def percent_to_sigma(self, percent: float) -> float:
        """Core's own takes every process for one of 1000 steps."""
        if percent <= 0 or percent >= 1:
            return float(super().percent_to_sigma(percent))
        return float(self.sigma(torch.tensor((1 - percent) * (self.num_timesteps - 1))))


def levels_of(config: DiffusionConfig) -> Levels:
    """The noise levels, and what core does with the network's output at them."""
    kind: type[Levels] = type("ModelSampling", (Levels, PREDICTED[config.objective]), {})
    return kind(config)


class Adapter(nn.Module):
    """A network as core calls it.

    Its weights have the names that the network gives them, those of the published checkpoints, so that weight patches and merges find them.
    """

    dtype = torch.float32
    in_channels = PixelFormat.latent_channels  # which nodes of core read, such as RenormCFG

    def __init__(self, model: DiffusionModel) -> None:
        super().__init__()
        self.model = model
        for name, part in model.network.named_children():
            self.add_module(name, part)

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Any = None, y: Tensor | None = None, control: Any = None,
        transformer_options: dict[str, Any] | None = None, **others: Any,
    ) -> Any:  # fmt: skip
        """The prediction [B, 3, H, W] for x at steps of the process [B]. A text, a ControlNet and patches of attention have no effect."""
        options = transformer_options or {}
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        return WrapperExecutor.new_class_executor(self.predict, self, wrappers).execute(x, timesteps, context, y, control, options)

    def predict(self, x: Tensor, timesteps: Tensor, context: Any = None, y: Tensor | None = None, *others: Any, **more: Any) -> Tensor:
        """One forward pass. Samplers that make several in a step stop between them after Cancel."""
        mm.throw_exception_if_processing_interrupted()
        return self.model.output(x, timesteps, y)


class CoreModel(BaseModel):
    """A diffusion model as core's own kind, which the MODEL socket and the nodes of the pack share.

    Both use patchers of this one object, so that the manager knows that they are one network: it is loaded once, and weight patches of one MODEL are
    taken out before another one, or a node of the pack, uses it.
    """

    def __init__(self, model: DiffusionModel, context: DeviceContext) -> None:
        # There is no type for x0; what core reads from it is the name of the objective in saved files.
        super().__init__(
            CoreConfig({"disable_unet_model_creation": True}),
            ModelType.V_PREDICTION if model.config.objective == "v" else ModelType.EPS,
        )
        self.ddpm, self.context = model, context
        self.diffusion_model = Adapter(model)
        self.model_sampling = levels_of(model.config)

    def extra_conds(self, **options: Any) -> dict[str, Any]:
        """The label of a CONDITIONING; whatever else it carries has no effect."""
        if self.ddpm.num_classes is None:
            return {}
        return {"y": comfy.conds.CONDRegular(torch.tensor([self.ddpm.class_index(options.get(CLASS_KEY, "zero"))]))}

    def memory_required(self, input_shape: Sequence[int], *args: Any, **options: Any) -> int:
        """Bytes that a forward pass needs beside the weights."""
        pixels = input_shape[0] * math.prod(input_shape[2:])
        return memory_needed(self.ddpm, None, pixels, None, self.context.dtype.itemsize, self.context.device)

    def check_samples(self, shape: Sequence[int]) -> None:
        """Raises BlendedError unless the network takes samples of a shape."""
        multiple = self.ddpm.multiple_of
        if len(shape) != 4 or shape[1] != PixelFormat.latent_channels:
            raise BlendedError(
                f"the LATENT has shape {'×'.join(map(str, shape))}, and this MODEL works on pixels, [batch, 3, height, width]; make the LATENT with VAE Encode and "
                f"the vae of {NAME}."
            )
        if shape[2] % multiple or shape[3] % multiple:
            raise BlendedError(
                f"the LATENT is {shape[3]}×{shape[2]}, and this MODEL needs sides that are multiples of {multiple}; scale the image before VAE Encode, best "
                f"to {self.ddpm.image_size}×{self.ddpm.image_size}, the size that it was trained at."
            )


def prepare_sampling(executor: Any, model: Any, noise_shape: Sequence[int], conds: Any, *args: Any, **options: Any) -> Any:
    """Loads the whole network before sampling, outside of inference mode: its layers do not fetch weights, and gradients must be able to pass them."""
    model.model.check_samples(noise_shape)
    if "force_full_load" in options:
        options["force_full_load"] = True
    with torch.inference_mode(False), torch.no_grad():
        prepared = executor(model, noise_shape, conds, *args, **options)
        load_rest(model)
    return prepared


def outer_sample(
    executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, denoise_mask: Tensor | None = None, *args: Any, **options: Any
) -> Tensor:  # fmt: skip
    """Restores the pixels where the mask is 0, to the last bit: some samplers end near them, and two of them with noise left."""
    # uni_pc writes to its sigmas, which are those of a scheduler node that keeps them for the next run.
    samples: Tensor = executor(noise, latent_image, sampler, sigmas.clone(), denoise_mask, *args, **options)
    if denoise_mask is None or not len(sigmas) or sigmas[-1]:
        return samples
    return torch.where(denoise_mask.to(samples.device) > 0, samples, latent_image.to(samples))


class DDPMAsModel(io.ComfyNode):
    """A diffusion model for core's samplers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendedDDPMAsModel",
            display_name=NAME,
            category=inputs.CATEGORY,
            description=(
                "Turns a pixel-space diffusion model into a MODEL for KSampler and every other node that takes a MODEL, with the VAE and the CONDITIONING "
                "that go with it. The LATENT of such a model is the image itself."
            ),
            search_aliases=["ADM", "guided diffusion", "KSampler", "pixel space model", "native model", "unconditional model"],
            inputs=[
                inputs.DDPM.Input("ddpm", tooltip="The diffusion model, from Load DDPM."),
                inputs.edit_option(
                    "class_choice",
                    default="zero",
                    tooltip="Class of the positive CONDITIONING, for a class-conditional model: zero (no class), or the number of a class.",
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="For KSampler and other nodes that take a MODEL."),
                io.Conditioning.Output(
                    "positive",
                    display_name="positive",
                    tooltip="The class. Empty for a model without classes. These models take no text prompt.",
                ),
                io.Conditioning.Output(
                    "negative", display_name="negative", tooltip="No class. It has an effect if the model has classes and cfg is not 1."
                ),
                io.Vae.Output("vae", display_name="vae", tooltip="Converts between images and pixel-space LATENTs, in float32."),
                io.Int.Output("size", display_name="size", tooltip="Side in pixels that the model was trained at."),
            ],
        )

    @classmethod
    def execute(cls, ddpm: LoadedDDPM, class_choice: str = "zero") -> io.NodeOutput:
        with library_scope(NAME):
            choice = inputs.parse_class(class_choice)
            if ddpm.model.num_classes is None and choice != "zero":
                warnings.warn(
                    BlendedWarning("the diffusion model is not class-conditional, so the class has no effect.", "class_choice"),
                    stacklevel=1,
                )
                choice = "zero"
            ddpm.model.class_index(choice)
            model = ddpm.patcher.clone()
            model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, prepare_sampling)
            model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, outer_sample)
            return io.NodeOutput(model, conditioning(choice), conditioning("zero"), pixel_vae(), ddpm.model.image_size)


def pixel_vae() -> VAE:
    """Core's VAE of pixel-space models, without what core's own loses: on many GPUs it works in bfloat16, and its rounding errors make SaveImage, which rounds
    down, write dark pixels one level darker."""
    vae = VAE(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
    vae.process_output = sample_to_levels_
    return vae


def conditioning(choice: str | int) -> list[Any]:
    """A CONDITIONING without text: 'zero' or the number of a class. Nodes that combine CONDITIONINGs expect a tensor, so it has an empty one."""
    return [[torch.zeros(1, 1, 1), {CLASS_KEY: choice}]]
