"""The two networks of the latent test bed, built from ComfyUI's classes. ComfyUI must be importable."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.taesd.taesd import Block, Clamp, conv
from torch import Tensor, nn

DATA = Path(__file__).with_name("data")
AUTOENCODER, UNET = DATA / "autoencoder.safetensors", DATA / "unet.safetensors"
CHANNELS, FACTOR = 4, 4
WIDTHS = (64, 48, 24)
"""Channels of the autoencoder at 16, 32 and 64 px."""
LATENT_SCALE = 0.25
"""The autoencoder's latents have a variance of about 1/LATENT_SCALE², so that latents that were not scaled for the UNet do not pass unnoticed."""
CONTEXT = 32
"""Width of the text embedding. The model was trained with an empty prompt: one token of zeros."""
UNET_CONFIG = {
    "image_size": 16,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "model_channels": 64,
    "channel_mult": (1, 1, 2),
    "num_res_blocks": [2, 1, 1],
    "conv_resample": False,
    "num_head_channels": 32,
    "use_spatial_transformer": True,
    "transformer_depth": [0, 0, 0, 0],
    "transformer_depth_output": [0, 0, 0, 0, 0, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": CONTEXT,
    "use_linear_in_transformer": True,
    "legacy": False,
}


class Autoencoder(nn.Module):
    """TAESD's layers at a quarter of its width and with two resolution steps: [B, 3, 4h, 4w] in −1..1 ↔ [B, 4, h, w]."""

    def __init__(self) -> None:
        super().__init__()
        low, middle, full = WIDTHS
        self.encoder = nn.Sequential(
            conv(3, full), nn.ReLU(), conv(full, middle, stride=2), Block(middle, middle),
            conv(middle, low, stride=2), Block(low, low), Block(low, low), conv(low, CHANNELS),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            Clamp(), conv(CHANNELS, low), nn.ReLU(), Block(low, low), Block(low, low), nn.Upsample(scale_factor=2), conv(low, middle),
            Block(middle, middle), nn.Upsample(scale_factor=2), conv(middle, full), Block(full, full), conv(full, 3),
        )  # fmt: skip

    def encode(self, pictures: Tensor) -> Tensor:
        """[B, 3, 4h, 4w] → [B, 4, h, w]."""
        latent: Tensor = self.encoder(pictures) / LATENT_SCALE
        return latent

    def decode(self, latent: Tensor) -> Tensor:
        """[B, 4, h, w] → [B, 3, 4h, 4w]."""
        pictures: Tensor = self.decoder(latent * LATENT_SCALE)
        return pictures


def new_unet(**options: Any) -> UNetModel:
    """The UNet, with weights that are not yet set."""
    return UNetModel(**UNET_CONFIG, **options)


def initialize(network: nn.Module) -> None:
    """Random weights as PyTorch's layers draw them: ComfyUI's layers leave memory unset. Residual branches begin at 0."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.Linear.reset_parameters(module)
        elif isinstance(module, nn.Conv2d):
            nn.Conv2d.reset_parameters(module)
        elif isinstance(module, nn.GroupNorm):
            nn.GroupNorm.reset_parameters(module)
        elif isinstance(module, nn.LayerNorm):
            nn.LayerNorm.reset_parameters(module)
    if isinstance(network, UNetModel):
        branches = [m.out_layers[-1] for m in network.modules() if hasattr(m, "out_layers")]
        branches += [m.proj_out for m in network.modules() if hasattr(m, "proj_out")]
        for parameter in itertools.chain.from_iterable(m.parameters() for m in (*branches, network.out[-1])):
            nn.init.zeros_(parameter)
