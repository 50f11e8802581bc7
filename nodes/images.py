"""Conversion between ComfyUI's IMAGE and MASK (channels last, 0..1) and the library's tensors (channels first)."""

from __future__ import annotations

import warnings

import comfy.model_management as mm
import torch
from torch import Tensor

from ..blended_core.edit import check_range
from ..blended_core.errors import BlendedError, BlendedWarning
from ..blended_core.mask import Box, from_labels
from .latent import as_mask_batch, shape_of

ROUNDING = 2**-15
"""More than the rounding error of a float32 value that went from 0..255 to −1..1 and back, in levels of 255."""


def checked_image(image: Tensor, name: str = "IMAGE") -> Tensor:
    """An IMAGE as [B, H, W, 3 or 4] float32 on the CPU; the IMAGE itself where it is that already, which must not be written to.

    Raises:
        BlendedError: if its shape is another one, or its values cannot be values in 0..1.
    """
    if image.ndim != 4 or image.shape[-1] not in (3, 4):
        raise BlendedError(f"the {name} has shape {shape_of(image)}; give images [batch, height, width, 3 (RGB) or 4 (RGBA)].")
    check_range(image, name)
    return image.detach().to("cpu", torch.float32)


def from_image(image: Tensor, name: str = "IMAGE") -> Tensor:
    """RGB [B, 3, H, W] float32 in 0..1 of :func:`checked_image`. A view: a large picture is not copied."""
    return checked_image(image, name)[..., :3].permute(0, 3, 1, 2)


def write_part(images: Tensor, box: Box, part: Tensor) -> None:
    """Writes a part of pictures [B, 3, h, w] into its box of IMAGEs [B, H, W, 3 or 4]; their alpha channel stays."""
    images[:, box.top : box.bottom, box.left : box.right, :3] = part.permute(0, 2, 3, 1)


def from_mask(mask: Tensor) -> Tensor:
    """MASK [B, H, W] → [B, 1, H, W] float32 on the CPU, a view where possible. Raises BlendedError for an empty mask.

    Warns:
        BlendedWarning: if the mask was made of the values 0 and 1 of an 8-bit file, which are taken as black and white.
    """
    values = as_mask_batch(mask)
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


def to_image(values: Tensor) -> Tensor:
    """[B, 3, H, W] in 0..1 → IMAGE."""
    return values.permute(0, 2, 3, 1).contiguous().to(mm.intermediate_device())


def sample_to_image(x: Tensor) -> Tensor:
    """[B, 3, H, W] in −1..1 → IMAGE, clamped."""
    return to_image(((x.float() + 1) / 2).clamp(0, 1))


def sample_to_levels_(x: Tensor) -> Tensor:
    """Samples in −1..1 → 0..1 in place, clamped, where what an 8-bit file held before it became a sample is that again to the last bit."""
    x.add_(1).div_(2).clamp_(0, 1)
    levels = (x * 255).round_()
    return x.copy_(torch.where((x * 255 - levels).abs_() < ROUNDING, levels / 255, x))


def to_intermediate(x: Tensor) -> Tensor:
    """Samples as a LATENT holds them: float32, on the device where ComfyUI keeps the outputs of nodes."""
    return x.detach().to(mm.intermediate_device(), torch.float32)
