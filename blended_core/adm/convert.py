"""One file with a checkpoint's weights and everything that has to be known about them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..diffusion import DiffusionModel
from ..errors import BlendedError
from ..io.atomic import replacing
from .unet import UNet


def convert(model: DiffusionModel, target: Path, half: bool = False) -> int:
    """Writes a loaded model as safetensors, with its configuration in the metadata; returns the file's size in bytes.

    The names are the network's own, without any prefix. The file appears whole or not at all.

    Args:
        model: from :func:`load_ddpm`, in float32.
        target: the file; one that is there is replaced.
        half: in float16.

    Raises:
        BlendedError: if the model is no ADM network, a weight is too large for half precision, or the file cannot be written.
    """
    unet = model.network
    if not isinstance(unet, UNet):
        raise BlendedError(f"only an ADM network can be converted, not a {type(unet).__name__}.")
    dtype = torch.float16 if half else torch.float32
    tensors = {}
    for name, value in unet.state_dict().items():
        tensors[name] = value.detach().to("cpu", dtype).contiguous()
        if not tensors[name].isfinite().all():
            raise BlendedError(
                f"{name} has values up to {float(value.abs().max()):.3g}, too large for half precision; convert without --half."
            )
    metadata = {"format": "pt", "unet": json.dumps(unet.config.to_dict()), "diffusion": json.dumps(model.config.to_dict())}
    try:
        with replacing(target) as part:
            save_file(tensors, part, metadata)
    except OSError as error:
        raise BlendedError(f"{target} cannot be written: {error.strerror or error}.") from None
    return target.stat().st_size
