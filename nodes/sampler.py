"""Blended Diffusion Sampler: a whole edit in one node."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.model_management as mm
import torch
from comfy_api.latest import io
from torch import Tensor

from ..blended_core.clip.model import Prompt
from ..blended_core.edit import edit_picture
from ..blended_core.memory import USUAL_BATCH
from ..blended_core.options import PRESETS, EditOptions, declared, preset
from ..blended_core.result import Candidate, EditResult
from ..blended_core.sample import Models, Step
from . import inputs
from .images import checked_image, from_mask, sample_to_image, write_part
from .inputs import edit_option, row_indices
from .latent import check_stretched, scale_mask
from .memory import LoadedDDPM, LoadedGuidance, LoadedPrompt, edit_models, load_managed_perceptual, load_to_device
from .runtime import Progress, format_score, library_scope, with_inputs

NAME = "Blended Diffusion Sampler"
AS_PRESET = "as the preset"


class BlendedSampler(io.ComfyNode):
    """Algorithm 2 or Algorithm 1 of the paper."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendedSampler",
            display_name=NAME,
            category=inputs.CATEGORY,
            description=(
                "Edits the masked part of an image from a prompt and leaves every other pixel unchanged. Makes several candidates, pastes them into "
                "the image at its own size, and returns them best first. Without a prompt it removes what the mask covers."
            ),
            search_aliases=[
                "inpaint",
                "outpaint",
                "edit image",
                "erase",
                "fill",
                "generative fill",
                "object removal",
                "remove object",
                "replace background",
                "local edit",
                "text-driven editing",
                "blended diffusion",
                "pixel diffusion",
                "CLIP guided diffusion",
            ],
            inputs=[
                inputs.DDPM.Input("ddpm", tooltip="The diffusion model, from Load DDPM."),
                io.Image.Input(
                    "image", tooltip="The source image, of any size. A square region around the mask is edited at the model's size."
                ),
                io.Mask.Input(
                    "mask",
                    tooltip="White: edit. One mask for all images, or one per image. A mask of another size is scaled to the image; its aspect ratio must be the same.",
                ),
                inputs.PROMPT.Input(
                    "prompt",
                    optional=True,
                    tooltip="The prompt, from Encode Prompt. Unconnected or empty: the masked part is filled in from its surroundings.",
                ),
                inputs.steps(
                    default=0,
                    min=0,
                    optional=True,
                    tooltip="Length of the whole diffusion process in steps. More steps are slower and finer. 0: the preset's number of steps.",
                ),
                edit_option("strength"),
                edit_option("seed", control_after_generate=True),
                edit_option("candidates", default=4),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="best",
                    optional=True,
                    tooltip=(
                        "best: recommended. fast: 60 % of the time, and its first candidate is about as good; steps above 0 and connected options override "
                        "its settings. paper: as the text of the paper describes it. official: reproduces the reference code, including its deviations "
                        "from the paper."
                    ),
                ),
                inputs.GUIDANCE.Input(
                    "options", optional=True, tooltip="From Guidance Options. Replaces the guidance options of the preset."
                ),
                edit_option("algorithm", advanced=True),
                edit_option("batch", advanced=True),
                edit_option("feather", advanced=True),
                edit_option("context", advanced=True),
                edit_option(
                    "mask_rule",
                    "mask_edges",
                    options=[AS_PRESET, "binary", "soft"],
                    default=AS_PRESET,
                    advanced=True,
                    tooltip="binary: everything from 50 % gray on is edited. soft: gray values set how freely a pixel may change.",
                ),
                edit_option(
                    "sampler",
                    options=[*declared(EditOptions)["sampler"][0].choices, AS_PRESET],
                    default=AS_PRESET,
                    advanced=True,
                    tooltip=declared(EditOptions)["sampler"][0].help
                    + " If you choose a sampler other than that of the preset, steps 0 means 100 steps; with fast, 40 steps with four views (two at "
                    "the noisier levels).",
                ),
                edit_option("eta", advanced=True),
                inputs.respacing(),
                edit_option(
                    "class_choice",
                    default="",
                    advanced=True,
                    tooltip="Class label for a class-conditional model: zero (no class), random (a new one at every step), or the number of a class. "
                    "Empty: the preset's choice.",
                ),
                edit_option(
                    "tone_match",
                    options=[AS_PRESET, *declared(EditOptions)["tone_match"][0].choices],
                    default=AS_PRESET,
                    advanced=True,
                ),
            ],
            outputs=[
                io.Image.Output("images", display_name="images", tooltip="The candidates, pasted at the source image's size, best first."),
                io.Image.Output("x0", display_name="x̂0", tooltip="The edited regions at the model's size, in the same order."),
                io.String.Output(
                    "scores",
                    display_name="scores",
                    tooltip="One line per candidate: rank, number, CLIP distance, seam. Also the likely reason if guidance had no effect.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        ddpm: LoadedDDPM,
        image: Tensor,
        mask: Tensor,
        prompt: LoadedPrompt | None = None,
        steps: int = 0,
        strength: float = 0.75,
        seed: int = 0,
        candidates: int = 4,
        preset: str = "best",
        options: LoadedGuidance | None = None,
        algorithm: str = "blended",
        batch: int = 4,
        feather: int = 0,
        context: float = 1.6,
        mask_edges: str = AS_PRESET,
        sampler: str = AS_PRESET,
        eta: float = 0.0,
        respacing: str = "",
        class_choice: str = "",
        tone_match: str = AS_PRESET,
    ) -> io.NodeOutput:
        changes: dict[str, Any] = {
            "strength": strength, "seed": seed, "candidates": candidates, "algorithm": algorithm, "batch": batch, "feather": feather,
            "context": context, "eta": eta,
        }  # fmt: skip
        if respacing.strip() or steps:
            changes["steps"] = respacing.strip() or str(steps)
        if sampler != AS_PRESET:
            changes["sampler"] = sampler
        if tone_match != AS_PRESET:
            changes["tone_match"] = tone_match
        if mask_edges != AS_PRESET:
            changes["mask_rule"] = mask_edges
        if class_choice.strip():
            changes["class_choice"] = inputs.parse_class(class_choice)
        with library_scope(NAME):
            resolved = resolve_options(preset, changes, options)
            images = checked_image(image)
            masks = from_mask(mask)
            rows = max(len(images), len(masks))
            image_of = row_indices(len(images), rows, "images")
            masks = masks[row_indices(len(masks), rows, "masks")]
            perceptual = options.perceptual if options is not None else None
            if perceptual is None and resolved.guidance.needs_perceptual:
                perceptual = load_managed_perceptual()
            if prompt is not None and not len(prompt.prompt):
                prompt = None
            clip = prompt.clip if prompt is not None else None
            pixels = min(batch or USUAL_BATCH, candidates) * ddpm.model.image_size**2
            managed = load_to_device(ddpm, clip, perceptual, pixels, resolved.guidance)
            ddpm.limits.reset()
            models = edit_models(ddpm, clip, perceptual, managed)
            results = edit_all(models, images, image_of, masks, prompt.prompt if prompt is not None else None, resolved)
            made = [(index, result, candidate) for index, result in zip(image_of, results, strict=True) for candidate in result.candidates]
            edited = images[[index for index, _, _ in made]]  # the only copy at the full size
            for row, (_, result, candidate) in enumerate(made):
                write_part(edited[row : row + 1], *result.part(candidate))
            regions = [sample_to_image(candidate.edited) for _, _, candidate in made]
            return io.NodeOutput(edited.to(mm.intermediate_device()), torch.cat(regions), scores(results, prompt is not None))


def resolve_options(name: str, changes: dict[str, Any], guidance: LoadedGuidance | None) -> EditOptions:
    """The options of a preset with the inputs of the node; connected guidance options replace those of the preset as a whole."""
    options = preset(name, **changes)
    return options if guidance is None else replace(options, guidance=guidance.options)


class EditProgress:
    """One progress bar with previews for several edits, one after the other."""

    def __init__(self, edits: int) -> None:
        self.edits = edits
        self.done = 0
        self.progress: Progress | None = None

    def on_start(self, result: EditResult) -> None:
        """Called when an edit starts."""
        self.result = result

    def on_step(self, step: Step) -> None:
        """Called after every step of a batch; raises if the user canceled."""
        options = self.result.options
        if self.progress is None:
            self.progress = Progress(self.edits * -(-options.candidates // options.batch) * step.total)
        self.done += 1
        self.progress.update(self.done, self.result.preview(step.x0[:1].cpu()) * 2 - 1)


def edit_all(
    models: Models, images: Tensor, image_of: list[int], masks: Tensor, prompt: Prompt | None, options: EditOptions
) -> list[EditResult]:
    """One edit per mask [N, 1, h, w], of the images [B, H, W, 3 or 4] that ``image_of`` names."""
    progress = EditProgress(len(masks))
    results = []
    for index, mask in zip(image_of, masks, strict=True):
        image = images[index, ..., :3].permute(2, 0, 1)
        height, width = image.shape[-2:]
        scaled = scale_mask(mask[None], (height, width))
        if not options.invert_mask:
            check_stretched(mask[None], scaled, options.mask_rule)
        results.append(edit_picture(image[None], scaled, prompt, models, options, progress.on_step, on_start=progress.on_start))
    return results


def scores(results: list[EditResult], prompted: bool) -> str:
    """A table of the candidates of each image, and the notes of the edits; ``prompted``: whether there was a prompt."""
    parts = []
    for number, result in enumerate(results, 1):
        lines = [f"Image {number}"] if len(results) > 1 else []
        if result.source_distance is not None:
            lines.append(f"source image: CLIP distance {format_score(result.source_distance)}")
        if not prompted:
            lines.append("no prompt: filled from the surroundings")
        lines += [score_line(candidate) for candidate in result.candidates]
        parts.append("\n".join(lines + [with_inputs(note, NAME) for note in result.notes]))
    return "\n\n".join(parts)


def score_line(candidate: Candidate) -> str:
    """'1. candidate 3: CLIP distance 0.712 (gain 0.105), seam 0.013'."""
    score, distance = candidate.score, ""
    if score.clip_distance is not None:
        distance = f"CLIP distance {format_score(score.clip_distance)} (gain {format_score(score.gain)}), "
    return f"{candidate.rank}. candidate {candidate.index}: {distance}seam {format_score(score.seam_energy)}"
