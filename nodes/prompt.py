"""Encode Prompt and Guidance Options."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..blended_core.clip.model import Prompt
from ..blended_core.errors import BlendedError
from ..blended_core.options import GuidanceOptions
from . import inputs
from .memory import LoadedCLIP, LoadedGuidance, LoadedPrompt, load_managed_perceptual, load_to_device
from .runtime import library_scope

ENCODE, OPTIONS = "Encode Prompt", "Guidance Options"
DEFAULTS = GuidanceOptions()
AUTOMATIC_SCALE = -1.0
"""Stands for the scale that the checkpoint recommends. 0 turns the CLIP loss off, as it always did in saved workflows."""


class EncodePrompt(io.ComfyNode):
    """Encodes a text with CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendedEncodePrompt",
            display_name=ENCODE,
            category=inputs.CATEGORY,
            description=(
                "Encodes a text with CLIP. Chain several nodes to combine texts. With an empty text the masked part is filled in from its surroundings "
                "(object removal)."
            ),
            search_aliases=["prompt", "negative prompt", "text encode", "CLIP text", "open clip text"],
            inputs=[
                inputs.CLIP.Input(
                    "clip",
                    tooltip="The CLIP, from Load CLIP (open_clip). ComfyUI's own CLIP does not fit, because it has no image gradients.",
                ),
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="What should appear inside the mask, worded like a caption: “a bowl of fruit”. Empty: object removal.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    optional=True,
                    tooltip="Weight of this text among the chained texts. A negative weight guides away from the text.",
                ),
                inputs.PROMPT.Input(
                    "previous", optional=True, tooltip="Another Encode Prompt with the same CLIP. Its texts are added to this prompt."
                ),
            ],
            outputs=[
                inputs.PROMPT.Output(
                    "prompt",
                    display_name="prompt",
                    tooltip="The prompt, for the sampler, CLIP Guidance Step or Rank by CLIP. It carries its CLIP.",
                )
            ],
        )

    @classmethod
    def execute(cls, clip: LoadedCLIP, text: str = "", weight: float = 1.0, previous: LoadedPrompt | None = None) -> io.NodeOutput:
        with library_scope(ENCODE):
            if not isinstance(clip, LoadedCLIP):
                raise BlendedError(
                    f"the clip is a {type(clip).__name__}; connect Load CLIP (open_clip). ComfyUI's own CLIP does not fit, because it has no image gradients."
                )
            if previous is not None and previous.clip is not clip:
                raise BlendedError(
                    f"the previous prompt was encoded with another CLIP; connect one Load CLIP (open_clip) to both {ENCODE} nodes."
                )
            load_to_device(None, clip)
            new = clip.model.prompt(text, weights=[weight])
            texts, weights, embeddings = new.texts, new.weights, new.embeddings.cpu()
            if previous is not None:
                before = previous.prompt
                texts, weights, embeddings = (
                    before.texts + texts, before.weights + weights, torch.cat([before.embeddings, embeddings])
                )  # fmt: skip
            return io.NodeOutput(LoadedPrompt(Prompt(texts, weights, embeddings), clip))


class GuidanceOptionsNode(io.ComfyNode):
    """The losses of the guidance and their weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def option(option: str, name: str | None = None, **changes: Any) -> Any:
            return inputs.from_option(GuidanceOptions, option, name, **changes)

        return io.Schema(
            node_id="BlendedGuidanceOptions",
            display_name=OPTIONS,
            category=inputs.CATEGORY,
            description=(
                "How CLIP guides the edit: scale, number of views, distance, gradient. Without this node the sampler uses the options of its preset, and "
                "CLIP Guidance Step the defaults of this node."
            ),
            search_aliases=["guidance scale", "CLIP guidance settings", "augmentations", "cutouts", "lambda"],
            inputs=[
                option("scale", default=AUTOMATIC_SCALE),
                option("views"),
                option("gradient"),
                option("distance", advanced=True),
                option("clip_input", advanced=True),
                option("range_scale", advanced=True),
                option("background_scale", advanced=True),
                option("clamp", default=0.0, advanced=True),
                option("view_chunk", advanced=True),
                option("reference_size", advanced=True),
                option("start", "guide_from", advanced=True),
                option("end", "guide_to", advanced=True),
                option("early_views", advanced=True),
                option("x0_if_needed", advanced=True),
            ],
            outputs=[
                inputs.GUIDANCE.Output("options", display_name="options", tooltip="The options, for the sampler or CLIP Guidance Step.")
            ],
        )

    @classmethod
    def execute(
        cls,
        scale: float = AUTOMATIC_SCALE,
        views: int = DEFAULTS.views,
        gradient: str = DEFAULTS.gradient,
        distance: str = DEFAULTS.distance,
        clip_input: str = DEFAULTS.clip_input,
        range_scale: float = DEFAULTS.range_scale,
        background_scale: float = DEFAULTS.background_scale,
        clamp: float = 0.0,
        view_chunk: int = DEFAULTS.view_chunk,
        reference_size: int = DEFAULTS.reference_size,
        guide_from: float = DEFAULTS.start,
        guide_to: float = DEFAULTS.end,
        early_views: int = DEFAULTS.early_views,
        x0_if_needed: bool = DEFAULTS.x0_if_needed,
    ) -> io.NodeOutput:
        with library_scope(OPTIONS):
            options = GuidanceOptions(
                scale=None if scale < 0 else scale, views=views, gradient=gradient, distance=distance, clip_input=clip_input, range_scale=range_scale,
                background_scale=background_scale, clamp=clamp or None, view_chunk=view_chunk, reference_size=reference_size, start=guide_from,
                end=guide_to, early_views=early_views, x0_if_needed=x0_if_needed,
            )  # fmt: skip
            return io.NodeOutput(LoadedGuidance(options, load_managed_perceptual() if options.needs_perceptual else None))
