"""One file with a checkpoint's weights and everything that has to be known about them."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..diffusion import DiffusionModel
from ..errors import BlendedError
from .adm import UNet


def convert(model: DiffusionModel, target: Path, half: bool = False) -> int:
    """Writes a loaded model as safetensors, with its configuration in the metadata; returns the file's size in bytes.

    The names are the network's own, without any prefix. The file appears whole or not at all.

    Args:
        model: from :func:`load_ddpm`, in float32.
        target: the file; one that is there is replaced.
        half: in float16.

    Raises:
        BlendedError: if a weight is too large for half precision, or the file cannot be written.
    """
    unet = model.network
    assert isinstance(unet, UNet)
    dtype = torch.float16 if half else torch.float32
    tensors = {}
    for name, value in unet.state_dict().items():
        tensors[name] = value.detach().to("cpu", dtype).contiguous()
        if not tensors[name].isfinite().all():
            raise BlendedError(
                f"{name} has values up to {float(value.abs().max()):.3g}, too large for half precision; convert without --half."
            )
    metadata = {"format": "pt", "unet": json.dumps(unet.config.to_dict()), "diffusion": json.dumps(model.config.to_dict())}
    handle, name = tempfile.mkstemp(dir=target.absolute().parent, suffix=".tmp")
    os.close(handle)
    try:
        save_file(tensors, name, metadata)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, target)
    except OSError as error:
        raise BlendedError(f"{target} cannot be written: {error.strerror or error}.") from None
    finally:
        Path(name).unlink(missing_ok=True)
    return target.stat().st_size


def _umask() -> int:
    """The process's mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
