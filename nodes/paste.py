"""Final Paste."""

from __future__ import annotations

import comfy.model_management as mm
import torch
from comfy_api.latest import io
from torch import Tensor

from ..blended_core.errors import BlendedError, Note
from ..blended_core.mask import Box, final_paste
from ..blended_core.region import feather_notes, pasted_part, resize, same_aspect
from . import inputs
from .images import checked_image, from_image, from_optional_mask, write_part
from .inputs import edit_option, row_indices
from .latent import START_NODE, Latent, fit_mask, unpack, warn
from .runtime import library_scope

NAME = "Final Paste"


class FinalPaste(io.ComfyNode):
    """Pastes the edit into the source image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendedFinalPaste",
            display_name=NAME,
            category=inputs.CATEGORY,
            description=(
                "Pastes the edit into the source image at its own size. Outside the mask the result equals the source image bit for bit. Accepts a clean "
                "LATENT of this pack, or any edited IMAGE, such as the result of another inpainting node."
            ),
            search_aliases=["paste back", "composite", "stitch", "restore unmasked pixels", "image composite masked"],
            inputs=[
                io.MultiType.Input(
                    "edited",
                    [io.Latent, io.Image],
                    tooltip="The clean LATENT of Denoise Loop End, or an edited IMAGE of the whole source image.",
                ),
                io.Image.Input("original", tooltip="The source image. The result has its size and its alpha channel."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White: take the edit. Unconnected: the mask that the LATENT carries. Required for an IMAGE.",
                ),
                edit_option("feather"),
                io.Boolean.Input(
                    "soft_mask",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="For an IMAGE: gray values of the mask blend the edit with the source image. Off: everything from 50 % gray on is taken.",
                ),
            ],
            outputs=[io.Image.Output("image", display_name="image", tooltip="The edited image at the source image's size.")],
        )

    @classmethod
    def execute(
        cls, edited: Latent | Tensor, original: Tensor, mask: Tensor | None = None, feather: int = 0, soft_mask: bool = False
    ) -> io.NodeOutput:
        with library_scope(NAME):
            images = checked_image(original, "original")
            rgb = images[..., :3].permute(0, 3, 1, 2)
            given = from_optional_mask(mask)
            if isinstance(edited, dict):
                box, part, image_of = paste_latent(edited, rgb, given, feather)
            else:
                box, part, image_of = paste_image(edited, rgb, given, soft_mask, feather)
            pasted = images[image_of]  # the only copy at the full size
            write_part(pasted, box, part)
            return io.NodeOutput(pasted.to(mm.intermediate_device()))


def paste_latent(latent: Latent, original: Tensor, mask: Tensor | None, feather: int) -> tuple[Box, Tensor, list[int]]:
    """(the box that the edits of a clean LATENT can change, their pixels there [B, 3, h, w], the index of each one's source image)."""
    noisy = unpack(latent, NAME)
    state = noisy.state
    if not state.clean:
        raise BlendedError(f"the LATENT at {NAME} is still noisy ({state}); denoise it with a Denoise Loop first.")
    state.check_size(original, "original")
    used = noisy.full_mask(mask, NAME)
    if used is None:
        raise BlendedError(f"{NAME} has no mask; connect a MASK to {START_NODE} or to this node.")
    finite = noisy.samples.isfinite().flatten(1).all(1)
    if not bool(finite.any()):
        raise BlendedError(
            f"the LATENT at {NAME} has NaN or Inf in all of its {len(noisy)} rows, so there is no result; lower the guidance scale, or use fp32.",
            option=("scale", "dtype"),
        )
    rows = list(noisy.images) if len(original) == len(state.sources) else row_indices(len(original), len(noisy), "originals")
    kept = finite.nonzero().flatten().tolist()
    if len(kept) < len(noisy):
        warn(Note(f"{len(noisy) - len(kept)} of {len(noisy)} rows have NaN or Inf and were left out.", option=("scale", "dtype")))
    rows, masks = [rows[i] for i in kept], noisy.mask_rows(used, "masks").rows(kept)
    for note in feather_notes(masks, state.region, feather):
        warn(note)
    # One image at a time: only its part around the mask is copied.
    found = [
        pasted_part(noisy.samples[i : i + 1], original[row : row + 1], masks.rows([at]), state.region, feather)
        for at, (i, row) in enumerate(zip(kept, rows, strict=True))
    ]
    return found[0][0], torch.cat([part for _, part in found]), rows


def paste_image(edited: Tensor, original: Tensor, mask: Tensor | None, soft: bool, feather: int) -> tuple[Box, Tensor, list[int]]:
    """As :func:`paste_latent`, of an edited IMAGE."""
    if mask is None:
        raise BlendedError(f"{NAME} got an IMAGE and no mask; connect a MASK that is white where the edit should be taken.")
    height, width = original.shape[-2:]
    size = (height, width)
    image = from_image(edited, "edited IMAGE")
    if not same_aspect((image.shape[-2], image.shape[-1]), size):
        raise BlendedError(
            f"the edited IMAGE is {image.shape[-1]}×{image.shape[-2]} and the original {width}×{height}, a different aspect ratio; connect an edited "
            "IMAGE of the whole original. (The output “x̂0” of Blended Diffusion Sampler and CLIP Guidance Step shows the region alone: connect the "
            "output “images” of the sampler, or the LATENT of Denoise Loop End.)"
        )
    full = resize(image, size)
    masks = fit_mask(mask, size, soft)
    rows = max(len(full), len(original), len(masks))
    image_of, edited_of = row_indices(len(original), rows, "originals"), row_indices(len(full), rows, "edited images")
    mask_of = row_indices(len(masks), rows, "masks")
    box = masks.box().grown(feather + 1, width, height)
    part = final_paste(full[box.slices][edited_of], original[box.slices][image_of], masks.part(box).rows(mask_of), feather)
    return box, part, image_of
