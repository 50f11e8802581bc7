"""Loads the latent test bed as ComfyUI's loader would: MODEL, a stand-in for its text CLIP, VAE. ComfyUI must be importable.

Its loader does not recognize networks of this size, so the objects that it makes are made here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import comfy.utils
import torch
from safetensors import safe_open
from torch import Tensor, nn

from .networks import AUTOENCODER, CHANNELS, CONTEXT, FACTOR, UNET, UNET_CONFIG, Autoencoder


class FlowNetwork(nn.Module):
    """The UNet as the network of a flow. x = (1 − σ)·x0 + σ·n is x of the UNet's process times a number, and from v follows the flow's n − x0."""

    def __init__(self, unet: nn.Module, levels: Any) -> None:
        super().__init__()
        self.unet, self.levels, self.dtype = unet, levels, unet.dtype

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, **more: Any) -> Tensor:
        """[B, 4, h, w], σ·1000 [B] → n − x0."""
        sigma = (timesteps / 1000).view(-1, 1, 1, 1)
        ratio = (sigma / (1 - sigma).clamp(min=1e-6)).clamp(max=float(self.levels.sigma_max))
        signal = (1 + ratio**2).rsqrt()
        inner = x / ((1 - sigma) ** 2 + sigma**2).sqrt()
        v = self.unet(inner, self.levels.timestep(ratio.flatten()).float(), context=context, **more)
        noise, x0 = signal * ratio * inner + signal * v, signal * inner - signal * ratio * v
        flow: Tensor = noise - x0
        return flow


def load_model(path: Path = UNET, flow: bool = False) -> Any:
    """The UNet as a MODEL that predicts v, with the latent format that was measured when it was trained; or as a flow, which has the same x̂0."""
    with safe_open(str(path), "pt") as file:
        numbers = {name: json.loads(text) for name, text in file.metadata().items()}

    class Format(comfy.latent_formats.LatentFormat):
        scale_factor = numbers["scale_factor"]
        latent_channels = CHANNELS
        spacial_downscale_ratio = FACTOR
        latent_rgb_factors = numbers["rgb_factors"]
        latent_rgb_factors_bias = numbers["rgb_bias"]

    class Config(comfy.supported_models_base.BASE):
        unet_extra_config: ClassVar[dict[str, Any]] = {}
        latent_format = Format

    config = Config({**UNET_CONFIG, "dtype": torch.float32})
    model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.V_PREDICTION)
    model.load_model_weights({k: v.float() for k, v in comfy.utils.load_torch_file(str(path)).items()})
    if flow:
        network = FlowNetwork(model.diffusion_model, model.model_sampling)
        config.unet_config["disable_unet_model_creation"] = True
        model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.FLOW)
        model.diffusion_model = network
    return comfy.model_patcher.CoreModelPatcher(model, mm.get_torch_device(), mm.unet_offload_device())


def load_vae(path: Path = AUTOENCODER) -> Any:
    """The autoencoder as a VAE."""
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    vae.first_stage_model = Autoencoder().eval().to(vae.vae_dtype)
    vae.first_stage_model.load_state_dict(comfy.utils.load_torch_file(str(path)))
    vae.patcher = comfy.model_patcher.CoreModelPatcher(vae.first_stage_model, vae.device, mm.vae_offload_device())
    vae.latent_channels, vae.downscale_ratio, vae.upscale_ratio, vae.size = CHANNELS, FACTOR, FACTOR, None
    vae.disable_offload = False
    vae.memory_used_encode = vae.memory_used_decode = lambda shape, dtype: 4096 * shape[2] * shape[3] * mm.dtype_size(dtype)
    vae.model_size()
    return vae


class EmptyTextEncoder:
    """What a text encoder of ComfyUI makes of an empty prompt, for every prompt: the model was trained without text."""

    def tokenize(self, text: str, **_: Any) -> str:
        """The text."""
        return text

    def encode_from_tokens_scheduled(self, _tokens: str, **_more: Any) -> list[list[Any]]:
        """CONDITIONING."""
        return [[torch.zeros(1, 1, CONTEXT), {}]]
