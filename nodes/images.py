"""Conversion between ComfyUI's IMAGE and MASK (channels last, 0..1) and the library's tensors (channels first)."""

from __future__ import annotations

import warnings

import comfy.model_management as mm
import torch
from torch import Tensor

from ..blended_core.edit import check_range
from ..blended_core.errors import BlendedError, BlendedWarning
from ..blended_core.mask import from_labels
from .latent import as_mask_batch, shape_of


def from_image(image: Tensor, name: str = "IMAGE") -> tuple[Tensor, Tensor | None]:
    """IMAGE [B, H, W, 3 or 4] → (RGB [B, 3, H, W] float32 in 0..1, alpha [B, 1, H, W] or None), copies on the CPU."""
    if image.ndim != 4 or image.shape[-1] not in (3, 4):
        raise BlendedError(f"the {name} has shape {shape_of(image)}; give images [batch, height, width, 3 (RGB) or 4 (RGBA)].")
    check_range(image, name)
    values = image.detach().to("cpu", torch.float32).permute(0, 3, 1, 2)
    rgb, *alpha = (part.clone(memory_format=torch.contiguous_format) for part in torch.split(values, 3, 1))
    return rgb, alpha[0] if alpha else None


def from_mask(mask: Tensor) -> Tensor:
    """MASK [B, H, W] → [B, 1, H, W] float32, a copy on the CPU. Raises BlendedError for an empty mask.

    Warns:
        BlendedWarning: if the mask was made of the values 0 and 1 of an 8-bit file, which are taken as black and white.
    """
    values = as_mask_batch(mask).clone()
    if (labels := from_labels(values)) is not None:
        values = labels
        warnings.warn(BlendedWarning("the MASK has the values 0 and 1 of 255 only; 1 is taken as white."), stacklevel=2)
    if not bool((values > 0).any()):
        raise BlendedError(
            f"the MASK is empty ({shape_of(mask)}, all 0), so nothing would be edited. Paint white where the image should change: "
            "right-click Load Image, Open in MaskEditor. (Load Image gives an empty mask for an image without transparency.)"
        )
    return values


def from_optional_mask(mask: Tensor | None) -> Tensor | None:
    """:func:`from_mask` for an input that may be unconnected."""
    return None if mask is None else from_mask(mask)


def to_image(values: Tensor, alpha: Tensor | None = None) -> Tensor:
    """[B, 3, H, W] in 0..1, with alpha [B or 1, 1, H, W] or None → IMAGE."""
    if alpha is not None:
        values = torch.cat([values, alpha.expand(len(values), -1, -1, -1).to(values)], 1)
    return values.permute(0, 2, 3, 1).contiguous().to(mm.intermediate_device())


def sample_to_image(x: Tensor) -> Tensor:
    """[B, 3, H, W] in −1..1 → IMAGE, clamped."""
    return to_image(((x.float() + 1) / 2).clamp(0, 1))


def to_intermediate(x: Tensor) -> Tensor:
    """Samples as a LATENT holds them: float32, on the device where ComfyUI keeps the outputs of nodes."""
    return x.detach().to(mm.intermediate_device(), torch.float32)
