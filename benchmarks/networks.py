"""The measured networks: real architectures with random weights, because the time of a step does not depend on the weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from blended_core.adm.unet import UNet, UNetConfig
from blended_core.clip.model import OPENAI_MEAN, OPENAI_STD, ClipModel, Prompt
from blended_core.clip.towers import vision_transformer
from blended_core.denoiser import DiffusionModel
from blended_core.device import DeviceContext, fast_precision
from blended_core.diffusion import DiffusionConfig

TINY_CLIP: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 64, "heads": 2, "layers": 2},
    "quick_gelu": True,
}
VIT_B_16: dict[str, Any] = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16},
    # Small, because a step does not use the text encoder.
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 64, "heads": 2, "layers": 1},
    "quick_gelu": True,  # as OpenAI's weights, which the reference code uses
}

VIT_B_32: dict[str, Any] = {**VIT_B_16, "vision_cfg": {**VIT_B_16["vision_cfg"], "patch_size": 32}}


@dataclass(frozen=True)
class Size:
    """Networks, batch size and number of views of a measurement."""

    name: str
    unet: UNetConfig
    clip: dict[str, Any]
    batch: int
    views: int


SIZES = {
    "small": Size(
        "small",
        UNetConfig(
            image_size=64, model_channels=64, channel_mult=(1, 2, 2, 2), num_res_blocks=2, attention_downsampling=(4, 8),
            num_head_channels=32, use_scale_shift_norm=True,
        ),
        TINY_CLIP, batch=4, views=8,
    ),
    "medium": Size(
        "medium",
        UNetConfig(
            image_size=128, model_channels=128, channel_mult=(1, 1, 2, 3, 4), num_res_blocks=2, attention_downsampling=(4, 8, 16),
            num_heads=4, use_scale_shift_norm=True, resblock_updown=True,
        ),
        VIT_B_16, batch=1, views=16,
    ),
    "full": Size(
        "full",
        UNetConfig(num_head_channels=64, use_scale_shift_norm=True, resblock_updown=True),
        VIT_B_16, batch=1, views=8,
    ),
}  # fmt: skip
"""small: 64 px, 9.9 M parameters, CLIP of 32 px. medium: 128 px, ViT-B/16. full: ADM of 256 px, ViT-B/16."""


def random_unet(config: UNetConfig, seed: int = 0) -> UNet:
    """A UNet with random weights. Layers that are initialized with zeros get small values instead, so that no computation is trivial."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet(config)
        for parameter in unet.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return unet


def diffusion_model(size: Size, context: DeviceContext) -> DiffusionModel:
    """The diffusion model of a size, on the device."""
    unet = random_unet(size.unet).set_compute_dtype(context.dtype)
    context.place(unet)
    return DiffusionModel.from_unet(unet, DiffusionConfig())


def random_clip(config: dict[str, Any]) -> nn.Module:
    """open_clip's network of a configuration with random weights."""
    import open_clip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network: nn.Module = open_clip.CLIP(**config)
    return network


def clip_models(size: Size, context: DeviceContext) -> tuple[ClipModel, ClipModel]:
    """CLIP of a size with random weights, on the device: with the library's image encoder, and as open_clip has it."""
    side = int(size.clip["vision_cfg"]["image_size"])
    theirs: Any = context.place(random_clip(size.clip))
    ours = copy.deepcopy(theirs)
    ours.visual = own_encoder(ours.visual)
    first, second = (ClipModel(m, None, f"random {side} px", OPENAI_MEAN, OPENAI_STD, side, 16) for m in (ours, theirs))
    return first, second


def own_encoder(visual: nn.Module) -> nn.Module:
    """The library's image encoder with the weights of open_clip's."""
    own = vision_transformer(visual)
    if own is None:
        raise ValueError("the library has no image encoder of this structure.")
    return own


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the library chooses bfloat16 on a device."""
    return fast_precision(device) is torch.bfloat16


def in_own_precision(clip: ClipModel) -> ClipModel | None:
    """A copy of CLIP in the precision that the library chooses on its device; None if that is float32."""
    chosen = copy.deepcopy(clip).in_precision("auto")
    return None if chosen.image_dtype == torch.float32 else chosen


def random_prompt(size: Size, context: DeviceContext) -> Prompt:
    """A random text embedding."""
    embedding = torch.randn(1, int(size.clip["embed_dim"]), generator=torch.Generator().manual_seed(2))
    return Prompt(("something",), (1.0,), context.put(embedding))
