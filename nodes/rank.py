"""Rank by CLIP."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..blended_core.errors import BlendedError
from ..blended_core.mask import EditMask
from ..blended_core.memory import run_in_parts
from ..blended_core.rank import RANKING_VIEWS_AT_ONCE, clip_distance_of_views, ranking
from ..blended_core.region import region_around
from . import inputs
from .images import from_image, from_optional_mask
from .latent import fit_mask
from .memory import LoadedPrompt, load_to_device
from .runtime import Progress, format_score, library_scope

NAME = "Rank by CLIP"
ONE_LIST = (
    "Join single images with Batch Images (or Image Batch) first; a node that is called once per item of a list ranks each item alone."
)


class RankByCLIP(io.ComfyNode):
    """Sorts images by their CLIP distance to a prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendedRankByCLIP",
            display_name=NAME,
            category=inputs.CATEGORY,
            description="Sorts images by the CLIP distance between their masked part and the prompt, best first, as the sampler ranks its candidates.",
            search_aliases=["sort images", "best of", "CLIP score", "pick best"],
            inputs=[
                io.Image.Input("images", tooltip="A batch of images, from any node."),
                inputs.PROMPT.Input("prompt", tooltip="The prompt, from Encode Prompt."),
                io.Mask.Input("mask", optional=True, tooltip="The part of the image that is scored. Unconnected: the whole image."),
                io.Int.Input("keep", default=0, min=0, max=4096, optional=True, tooltip="Number of images to return. 0: all."),
            ],
            outputs=[
                io.Image.Output("images", display_name="images", tooltip="The images, best first."),
                io.String.Output(
                    "scores", display_name="scores", tooltip="One line per image: rank, position in the batch, CLIP distance."
                ),
            ],
        )

    @classmethod
    def execute(cls, images: Tensor, prompt: LoadedPrompt, mask: Tensor | None = None, keep: int = 0) -> io.NodeOutput:
        with library_scope(NAME):
            if not len(prompt.prompt):
                raise BlendedError("Rank by CLIP needs a prompt with text; enter one in Encode Prompt.")
            rgb = from_image(images)
            given = from_optional_mask(mask)
            height, width = rgb.shape[-2:]
            masks = EditMask(rgb.new_ones(1, 1, height, width)) if given is None else fit_mask(given, (height, width), False)
            inputs.row_indices(len(masks), len(rgb), "masks")
            progress = Progress(len(rgb))
            distances: list[float | None] = []
            clip, at_once = prompt.clip.model, RANKING_VIEWS_AT_ONCE
            context = load_to_device(None, prompt.clip, images_per_pass=at_once)
            for i in range(len(rgb)):
                own = masks.rows([i])
                region = region_around(own, clip.image_size)
                image = context.put(region.cut(rgb[i : i + 1], clip.image_size) * 2 - 1)
                area = context.put(region.cut_mask(own, clip.image_size).values)

                def distance(views: int, image: Tensor = image, area: Tensor = area) -> Tensor:
                    return clip_distance_of_views(image, area, clip, prompt.prompt, at_once=views)

                found, at_once = run_in_parts(distance, at_once, context, "views are scored")
                distances.append(float(found))
                progress.update(i + 1)
            order = ranking(distances)[: keep or None]
            table = "\n".join(f"{rank}. image {i + 1}: CLIP distance {format_score(distances[i])}" for rank, i in enumerate(order, 1))
            if len(rgb) == 1:
                table += f"\nOnly one image was given, so there is nothing to rank. {ONE_LIST}"
            return io.NodeOutput(images[order], table)
