"""Final Paste."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..blended_core.errors import BlendedError, Note
from ..blended_core.mask import final_paste
from ..blended_core.region import feather_notes, paste, resize, same_aspect
from . import inputs
from .images import from_image, from_optional_mask, to_image
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
            rgb, alpha = from_image(original, "original")
            given = from_optional_mask(mask)
            if isinstance(edited, dict):
                pasted, image_of = paste_latent(edited, rgb, given, feather)
            else:
                pasted, image_of = paste_image(edited, rgb, given, soft_mask, feather)
            return io.NodeOutput(to_image(pasted, None if alpha is None else alpha[image_of]))


def paste_latent(latent: Latent, original: Tensor, mask: Tensor | None, feather: int) -> tuple[Tensor, list[int]]:
    """(the edits of a clean LATENT in their source images [B, 3, H, W], the index of each one's source image)."""
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
    return paste(noisy.samples[kept], original[rows], masks, state.region, feather), rows


def paste_image(edited: Tensor, original: Tensor, mask: Tensor | None, soft: bool, feather: int) -> tuple[Tensor, list[int]]:
    """As :func:`paste_latent`, of an edited IMAGE."""
    if mask is None:
        raise BlendedError(f"{NAME} got an IMAGE and no mask; connect a MASK that is white where the edit should be taken.")
    height, width = original.shape[-2:]
    size = (height, width)
    image, _ = from_image(edited, "edited IMAGE")
    if not same_aspect((image.shape[-2], image.shape[-1]), size):
        raise BlendedError(
            f"the edited IMAGE is {image.shape[-1]}×{image.shape[-2]} and the original {width}×{height}, a different aspect ratio; connect an edited "
            "IMAGE of the whole original. (The output “x̂0” of Blended Diffusion Sampler and CLIP Guidance Step shows the region alone: connect the "
            "output “images” of the sampler, or the LATENT of Denoise Loop End.)"
        )
    full = resize(image, size)
    masks = fit_mask(mask, size, soft)
    rows = max(len(full), len(original), len(masks))
    image_of, masks = row_indices(len(original), rows, "originals"), masks.rows(row_indices(len(masks), rows, "masks"))
    return final_paste(full[row_indices(len(full), rows, "edited images")], original[image_of], masks, feather), image_of
