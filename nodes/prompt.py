"""What to draw and how hard to pull: Encode Prompt, Guidance Options."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..blended_core.clip.model import Prompt
from ..blended_core.errors import BlendedError
from ..blended_core.options import GuidanceOptions
from . import glue

DEFAULTS = GuidanceOptions()


class EncodePrompt(io.ComfyNode):
    """Text → what CLIP should see."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendedEncodePrompt",
            display_name="Encode Prompt",
            category=glue.CATEGORY,
            description=(
                "Puts a text into CLIP's terms. Chain several to ask for all of them at once. An empty text asks for nothing: the masked part is "
                "then filled from its surroundings (object removal)."
            ),
            search_aliases=["prompt", "text encode", "CLIP text", "open clip text"],
            inputs=[
                glue.CLIP.Input(
                    "clip", tooltip="From Load CLIP (open_clip). ComfyUI's own CLIP does not fit: it has no gradient for pictures."
                ),
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="What should appear inside the mask, as a caption would say it: “a bowl of fruit”. Empty: removal.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    optional=True,
                    tooltip="Of this text among the chained ones. Below 0 pushes away from it.",
                ),
                glue.PROMPT.Input("previous", optional=True, tooltip="Another Encode Prompt with the same CLIP; its texts count too."),
            ],
            outputs=[
                glue.PROMPT.Output(
                    "prompt", display_name="prompt", tooltip="For CLIP Guidance Step, the sampler or Rank by CLIP; it carries its CLIP."
                )
            ],
        )

    @classmethod
    def execute(
        cls, clip: glue.LoadedCLIP, text: str = "", weight: float = 1.0, previous: glue.LoadedPrompt | None = None
    ) -> io.NodeOutput:
        with glue.engine():
            if previous is not None and previous.clip is not clip:
                raise BlendedError(
                    "the previous prompt was encoded with another CLIP; wire one Load CLIP (open_clip) into both Encode Prompt nodes."
                )
            glue.on_device(None, clip)
            new = clip.model.prompt(text, weights=[weight])
            prompt = Prompt(new.texts, new.weights, new.embeddings.cpu())
            if previous is not None:
                before = previous.prompt
                prompt = Prompt(
                    before.texts + prompt.texts, before.weights + prompt.weights, torch.cat([before.embeddings, prompt.embeddings])
                )
        return io.NodeOutput(glue.LoadedPrompt(prompt, clip))


class GuidanceOptionsNode(io.ComfyNode):
    """The losses and their weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendedGuidanceOptions",
            display_name="Guidance Options",
            category=glue.CATEGORY,
            description=(
                "How CLIP pulls at the picture: strength, number of views, distance, gradient. Without this node the sampler takes its preset's "
                "options and the step node those of the preset best."
            ),
            search_aliases=["guidance scale", "CLIP guidance settings", "augmentations", "cutouts", "lambda"],
            inputs=[
                io.Float.Input(
                    "scale",
                    default=DEFAULTS.scale,
                    min=0.0,
                    max=100000.0,
                    step=10.0,
                    optional=True,
                    tooltip="How hard CLIP pulls. Too low: the edit ignores the prompt. Too high: glaring colours and patterns that only CLIP can read.",
                ),
                io.Int.Input(
                    "views",
                    default=DEFAULTS.views,
                    min=1,
                    max=256,
                    optional=True,
                    tooltip="Warped copies that CLIP sees a step. More give cleaner shapes and cost CLIP time; 1 turns the augmentations off.",
                ),
                io.Combo.Input(
                    "gradient",
                    options=["unet", "x0"],
                    default=DEFAULTS.gradient,
                    optional=True,
                    tooltip="x0: at the estimate of the finished picture, as in the paper; fast, in little memory. unet: through the diffusion model, as in the reference code; slower, in several times the memory.",
                ),
                io.Combo.Input(
                    "distance",
                    options=["spherical", "cosine", "spherical_unclamped"],
                    default=DEFAULTS.distance,
                    optional=True,
                    advanced=True,
                    tooltip="Between the CLIP embeddings of picture and text. cosine is the paper's, spherical the reference code's.",
                ),
                io.Combo.Input(
                    "clip_input",
                    options=["x0", "mixed"],
                    default=DEFAULTS.clip_input,
                    optional=True,
                    advanced=True,
                    tooltip="What CLIP sees: the estimate of the finished picture, or (reference code) that mixed with the noisy one.",
                ),
                io.Float.Input(
                    "range_scale",
                    default=DEFAULTS.range_scale,
                    min=0.0,
                    max=100000.0,
                    step=10.0,
                    optional=True,
                    advanced=True,
                    tooltip="Pulls colours back that leave the range of a picture.",
                ),
                io.Float.Input(
                    "background_scale",
                    default=DEFAULTS.background_scale,
                    min=0.0,
                    max=1000000.0,
                    step=100.0,
                    optional=True,
                    advanced=True,
                    tooltip="λ of Algorithm 1: how much the background should stay by its loss alone. Blending does not need it; above 0 loads LPIPS.",
                ),
                io.Float.Input(
                    "clamp",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Largest root mean square of a picture's gradient; 0: no limit.",
                ),
                io.Int.Input(
                    "view_chunk",
                    default=DEFAULTS.view_chunk,
                    min=0,
                    max=256,
                    optional=True,
                    advanced=True,
                    tooltip="Views that go through CLIP at once; lower needs less memory and gives the same picture. 0: all.",
                ),
                io.Int.Input(
                    "reference_size",
                    default=DEFAULTS.reference_size,
                    min=0,
                    max=4096,
                    step=64,
                    optional=True,
                    advanced=True,
                    tooltip="Side of the pictures that the scales are meant for: one scale then suits models of every size. 0: scales as they are.",
                ),
                io.Float.Input(
                    "guide_from",
                    default=DEFAULTS.start,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="CLIP begins to pull at this part of the noise levels; 0: from the noisiest on. Steps without CLIP are faster.",
                ),
                io.Float.Input(
                    "guide_to",
                    default=DEFAULTS.end,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="CLIP stops pulling at this part of the noise levels; 1: at the clean picture. Steps without CLIP are faster.",
                ),
                io.Int.Input(
                    "early_views",
                    default=DEFAULTS.early_views,
                    min=0,
                    max=256,
                    optional=True,
                    advanced=True,
                    tooltip="Views in the noisier half, where there is little to see yet; fewer are faster. 0: as many as views.",
                ),
                io.Boolean.Input(
                    "x0_if_needed",
                    default=DEFAULTS.x0_if_needed,
                    optional=True,
                    advanced=True,
                    tooltip="Where memory does not suffice for the gradient unet, take x0 instead of failing. The picture is another one; the scores say so.",
                ),
            ],
            outputs=[glue.GUIDANCE.Output("options", display_name="options", tooltip="For the sampler or CLIP Guidance Step.")],
        )

    @classmethod
    def execute(
        cls,
        scale: float = DEFAULTS.scale,
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
        with glue.engine():
            options = GuidanceOptions(
                scale=scale,
                views=views,
                gradient=gradient,
                distance=distance,
                clip_input=clip_input,
                range_scale=range_scale,
                background_scale=background_scale,
                clamp=clamp or None,
                view_chunk=view_chunk,
                reference_size=reference_size,
                start=guide_from,
                end=guide_to,
                early_views=early_views,
                x0_if_needed=x0_if_needed,
            )
            return io.NodeOutput(glue.LoadedGuidance(options, glue.managed_perceptual() if options.needs_perceptual else None))
