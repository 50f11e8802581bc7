"""Writing a checkpoint as one file with its weights and its settings."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..denoiser import DiffusionModel
from ..errors import BlendedError
from ..io.atomic import replacing
from .unet import UNet


def convert(model: DiffusionModel, target: Path, half: bool = False) -> int:
    """Writes a model as safetensors with its settings in the metadata; returns the size of the file in bytes.

    Tensors have the network's own names, without a prefix. After an error ``target`` is unchanged.

    Args:
        model: from :func:`load_checkpoint`, in float32.
        target: the file; an existing file is replaced.
        half: writes float16.

    Raises:
        BlendedError: if the model is not an ADM network, a weight is too large for float16, or the file cannot be written.
    """
    unet = model.network
    if not isinstance(unet, UNet):
        raise BlendedError(f"only an ADM network can be converted, not a {type(unet).__name__}.", option="ddpm")
    dtype = torch.float16 if half else torch.float32
    tensors = {}
    for name, value in unet.state_dict().items():
        tensors[name] = value.detach().to("cpu", dtype).contiguous()
        if not tensors[name].isfinite().all():
            raise BlendedError(
                f"{name} has values up to {float(value.abs().max()):.3g}, too large for float16; write float32.", option="half"
            )
    metadata = {"format": "pt", "unet": json.dumps(unet.config.to_dict()), "diffusion": json.dumps(model.config.to_dict())}
    if model.guidance_scale is not None:
        metadata["guidance_scale"] = f"{model.guidance_scale:g}"
    try:
        with replacing(target) as part:
            save_file(tensors, part, metadata)
    except OSError as error:
        raise BlendedError(f"{target} cannot be written: {error.strerror or error}.") from None
    return target.stat().st_size
