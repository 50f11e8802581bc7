"""Final Paste."""

from __future__ import annotations

from typing import NamedTuple

from comfy_api.latest import io
from torch import Tensor

from ..blended_core.errors import BlendedError
from ..blended_core.mask import final_paste
from ..blended_core.region import resize
from . import inputs
from .images import from_image, from_optional_mask, to_image
from .inputs import edit_option, row_indices
from .latent import Latent, NoisyImages, fit_mask, unpack
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
            edit = latent_edit(edited, rgb, given) if isinstance(edited, dict) else image_edit(edited, rgb, given, soft_mask)
            pasted = final_paste(edit.values, rgb[edit.image_of], edit.mask, soft=edit.soft, feather=feather)
            return io.NodeOutput(to_image(pasted, None if alpha is None else alpha[edit.image_of]))


class Edit(NamedTuple):
    """Edited images [B, 3, H, W] in 0..1, their masks, the index of each one's source image, and whether the masks are soft."""

    values: Tensor
    mask: Tensor
    image_of: list[int]
    soft: bool


def latent_edit(latent: Latent, original: Tensor, mask: Tensor | None) -> Edit:
    """The edit of a clean LATENT, at the source images' size."""
    noisy = unpack(latent, NAME)
    state = noisy.state
    if not state.clean:
        raise BlendedError(f"the LATENT at {NAME} is still noisy ({state}); denoise it with a Denoise Loop first.")
    state.check_size(original, "original")
    if mask is None:
        mask = state.masks if state.masks is not None else full_noise_mask(noisy)
    if mask is None:
        raise BlendedError(f"{NAME} has no mask; connect a MASK to Noise Background (start) or to this node.")
    rows = list(noisy.images) if len(original) == len(state.sources) else row_indices(len(original), len(noisy), "originals")
    full = state.region.put_back((noisy.samples + 1) / 2, original[rows])
    return Edit(full, noisy.rows_of(fit_mask(mask, original.shape[-2:], state.soft), "masks"), rows, state.soft)


def full_noise_mask(noisy: NoisyImages) -> Tensor | None:
    """A noise mask that another node set, in the frame of the source image."""
    mask, region = noisy.region_mask(None), noisy.state.region
    return None if mask is None else region.put_back(mask, mask.new_zeros(len(mask), 1, region.height, region.width)).clamp(0, 1)


def image_edit(edited: Tensor, original: Tensor, mask: Tensor | None, soft: bool) -> Edit:
    """The edit of an IMAGE, at the source images' size."""
    if mask is None:
        raise BlendedError(f"{NAME} got an IMAGE and no mask; connect a MASK that is white where the edit should be taken.")
    size = original.shape[-2:]
    full = resize(from_image(edited, "edited IMAGE")[0], (size[0], size[1]))
    masks = fit_mask(mask, size, soft)
    rows = max(len(full), len(original), len(masks))
    full, masks = full[row_indices(len(full), rows, "edited images")], masks[row_indices(len(masks), rows, "masks")]
    return Edit(full, masks, row_indices(len(original), rows, "originals"), soft)
