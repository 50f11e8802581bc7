"""Cut Region and Paste Region."""

from __future__ import annotations

import comfy.model_management as mm
from comfy_api.latest import io
from torch import Tensor

from ..blended_core.cuts import SHAPES, SQUARE, Cuts, cut_out, paste_back, plan
from ..blended_core.errors import BlendedError, Note
from ..blended_core.mask import EditMask
from . import inputs
from .images import checked_image, from_image, from_mask, from_optional_mask, to_image, to_intermediate
from .inputs import edit_option
from .latent import fit_mask, warn
from .memory import LoadedDDPM
from .runtime import library_scope

CUT, PASTE = "Cut Region", "Paste Region"


class CutRegion(io.ComfyNode):
    """Cuts the region around a mask out of an image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendedCutRegion",
            display_name=CUT,
            category=inputs.CATEGORY,
            description=(
                "Cuts the region around the mask out of an image, at the size of any model. Edit the cut with any nodes; Paste Region puts it back and "
                "leaves every pixel outside the mask unchanged."
            ),
            search_aliases=["crop", "inpaint crop", "crop and stitch", "crop by mask", "inpaint only masked", "detailer", "context"],
            inputs=[
                io.Image.Input("image", tooltip="The source image, of any size, or a batch."),
                io.Mask.Input(
                    "mask",
                    tooltip="White: edit. One mask for all images, one per image, or many masks of one image: each gives a cut, and Paste Region puts all "
                    "of them into that image.",
                ),
                inputs.DDPM.Input(
                    "ddpm",
                    optional=True,
                    tooltip="If connected, the cut is a square of the size of this model; size, shape and multiple are not used.",
                ),
                io.Int.Input(
                    "size",
                    default=1024,
                    min=8,
                    max=8192,
                    step=8,
                    optional=True,
                    tooltip="Side of a square cut in pixels, for a model that was trained at that size. Another shape has about as many pixels.",
                ),
                io.Combo.Input(
                    "shape",
                    options=list(SHAPES),
                    default=SQUARE,
                    optional=True,
                    tooltip="square: as most models were trained. as the mask: width and height in the ratio of the mask with its context, at most 4 to 1.",
                ),
                edit_option(
                    "context",
                    tooltip="Longer side of the region, as a multiple of the longer side of the mask. More context fits the edit in better and leaves it fewer "
                    "pixels.",
                ),
                io.Int.Input(
                    "multiple",
                    default=64,
                    min=1,
                    max=512,
                    optional=True,
                    advanced=True,
                    tooltip="Width and height of the cut are rounded to multiples of this number. 64 suits all models; 8 or 16 follow the shape more closely.",
                ),
                io.Boolean.Input(
                    "soft_mask",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Gray values of the mask are kept, for Differential Diffusion or Blended Noise, and fade the edit out in the paste. Off: everything "
                    "from 50 % gray on is edited.",
                ),
                io.Boolean.Input(
                    "one_region",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="One region around all masks, so that the frames of a video do not move against each other. Off: each mask has a region of its own.",
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="The cut, RGB. For a latent model: to VAE Encode."),
                io.Mask.Output("mask", display_name="mask", tooltip="The mask of the cut. For a latent model: to Set Latent Noise Mask."),
                inputs.REGION.Output("region", display_name="region", tooltip="Where the cut was, for Paste Region."),
                io.Latent.Output(
                    "latent",
                    display_name="latent",
                    tooltip="Only for a pixel-space MODEL (DDPM as MODEL): the cut as a LATENT with its noise mask, for KSampler. Not for SDXL or Flux.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        mask: Tensor,
        ddpm: LoadedDDPM | None = None,
        size: int = 1024,
        shape: str = SQUARE,
        context: float = 1.6,
        multiple: int = 64,
        soft_mask: bool = False,
        one_region: bool = False,
    ) -> io.NodeOutput:
        with library_scope(CUT):
            rgb = from_image(image)
            masks = fit_mask(from_mask(mask), (rgb.shape[-2], rgb.shape[-1]), soft_mask)
            if ddpm is not None:
                size, shape, multiple = ddpm.model.image_size, SQUARE, 1
            cuts, cut, area = cut_out(rgb, masks, size, shape, multiple, context, one_region)
            values = area.values.to(mm.intermediate_device())
            latent = {"samples": to_intermediate(cut * 2 - 1), "noise_mask": values}
            return io.NodeOutput(to_image(cut), values[:, 0], cuts, latent)


class PasteRegion(io.ComfyNode):
    """Pastes edited cuts into the image that they were cut from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendedPasteRegion",
            display_name=PASTE,
            category=inputs.CATEGORY,
            description=(
                "Pastes an edited cut of Cut Region into the source image. Outside the mask the result equals the source image bit for bit, whatever made "
                "the edit."
            ),
            search_aliases=["stitch", "inpaint stitch", "crop and stitch", "uncrop", "paste back", "composite"],
            inputs=[
                io.Image.Input("edited", tooltip="The edited cut, at any scale: from VAE Decode, an upscaler or any other node."),
                io.Image.Input(
                    "original", tooltip="The image that was cut, or a result of another Paste Region. Its alpha channel is kept."
                ),
                inputs.REGION.Input("region", tooltip="From the Cut Region that made the cut."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White: take the edit. Of the size of the original, or of the cut. Unconnected: the mask of Cut Region.",
                ),
                edit_option("feather"),
                io.Boolean.Input(
                    "tone_match",
                    default=False,
                    optional=True,
                    tooltip="Removes color shifts, such as those of a VAE, so that the edge of the mask does not show: the shift is measured around the mask and subtracted "
                    "inside it. At most 16 of 255.",
                ),
            ],
            outputs=[io.Image.Output("image", display_name="image", tooltip="The edited image at the original's size.")],
        )

    @classmethod
    def execute(
        cls,
        edited: Tensor,
        original: Tensor,
        region: Cuts,
        mask: Tensor | None = None,
        feather: int = 0,
        tone_match: bool = False,
    ) -> io.NodeOutput:
        with library_scope(PASTE):
            if not isinstance(region, Cuts):
                raise BlendedError(f"the region is a {type(region).__name__}; connect the output “region” of {CUT}.")
            images = checked_image(original, "original")
            cuts = from_image(edited, "edited IMAGE")
            given, shows_cut = paste_mask(from_optional_mask(mask), region, cuts)
            image_of, pastes = plan(region, len(cuts), len(images))
            results = images[image_of]  # the only copy at the full size
            for note in paste_back(results[..., :3].permute(0, 3, 1, 2), cuts, region, pastes, given, shows_cut, feather, tone_match):
                warn(note)
            return io.NodeOutput(results.to(mm.intermediate_device()))


def paste_mask(mask: Tensor | None, region: Cuts, edited: Tensor) -> tuple[EditMask | None, bool]:
    """The mask for the paste [M, 1, h, w], and whether it shows the cut.

    A mask of the size of the cut, or of the edited cut, shows the cut, unless the original has that size too.
    """
    if mask is None:
        return None, False
    size, soft = (region.regions[0].height, region.regions[0].width), region.mask.soft
    own = (mask.shape[-2], mask.shape[-1])
    if own != size and own in (region.size, (edited.shape[-2], edited.shape[-1])):
        return EditMask.of(mask, "soft" if soft else "binary"), True
    if own == region.size and any((each.left, each.top, *each.size) != (0, 0, *size) for each in region.regions):
        warn(Note(f"the cut and the original have one size; the mask at {PASTE} is taken as drawn over the original."))
    return fit_mask(mask, size, soft), False
