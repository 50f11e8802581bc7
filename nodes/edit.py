"""Whole edits in one node, and what goes with them: Blended Diffusion Sampler, Rank by CLIP, Demo Scene."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..blended_core.clip.model import Prompt
from ..blended_core.edit import edit_picture, finished_frame
from ..blended_core.errors import BlendedError
from ..blended_core.memory import fewer_at_once
from ..blended_core.options import PRESETS, EditOptions, preset
from ..blended_core.rank import VIEWS_AT_ONCE, clip_distance_of_views, ranking
from ..blended_core.region import region_around
from ..blended_core.result import Candidate, EditResult
from ..blended_core.sample import Models, Step
from ..blended_core.toy.world import BACKGROUNDS, OBJECTS, demo_scene
from . import glue, inputs
from .latent import fit_mask

AS_PRESET = "as the preset"


class BlendedSampler(io.ComfyNode):
    """Algorithm 2, or 1, in one node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        best = PRESETS["best"]
        return io.Schema(
            node_id="BlendedSampler",
            display_name="Blended Diffusion Sampler",
            category=glue.CATEGORY,
            description=(
                "Edits the masked part of a picture from a prompt and leaves every other pixel untouched: several candidates, pasted at the picture's own "
                "size, best first. Without a prompt it removes what the mask covers."
            ),
            search_aliases=["inpaint", "blended diffusion", "local edit", "object removal", "text-driven editing", "CLIP guided diffusion"],
            inputs=[
                glue.DDPM.Input("ddpm", tooltip="From Load DDPM."),
                io.Image.Input("image", tooltip="The picture, any size. A square around the mask is edited at the model's size."),
                io.Mask.Input(
                    "mask", tooltip="White: edit. One for all pictures, or one for each; another size is stretched over the picture."
                ),
                glue.PROMPT.Input(
                    "prompt",
                    optional=True,
                    tooltip="From Encode Prompt. Not wired, or empty: the masked part is filled from its surroundings.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=4000,
                    optional=True,
                    tooltip="Steps of the whole process from pure noise; more are slower and finer. 0: as many as the preset says.",
                ),
                io.Float.Input(
                    "strength",
                    default=best.strength,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Share of the steps that is done. 1 forgets what the mask covers; 0.4 keeps its colours and shapes.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=inputs.MAX_SEED,
                    control_after_generate=True,
                    optional=True,
                    tooltip="Candidate i depends on the seed and i alone. The terminal gives the same picture for the same seed and batch.",
                ),
                io.Int.Input(
                    "candidates",
                    default=4,
                    min=1,
                    max=256,
                    optional=True,
                    tooltip="How many results of each picture; the best comes first. The paper makes 64 and keeps a few.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="best",
                    optional=True,
                    tooltip="best: our recommendation. fast: the first ranked as good in a third of the time; steps above 0 and wired options win over its own. paper: as its text has it. official: the reference code draw by draw, its quirks included.",
                ),
                glue.GUIDANCE.Input("options", optional=True, tooltip="From Guidance Options; replaces the preset's guidance."),
                io.Combo.Input(
                    "algorithm",
                    options=["blended", "local"],
                    default="blended",
                    optional=True,
                    advanced=True,
                    tooltip="blended: Algorithm 2. local: Algorithm 1, where the background is only asked for by a loss (λ) and drifts.",
                ),
                io.Int.Input(
                    "batch",
                    default=best.batch,
                    min=1,
                    max=64,
                    optional=True,
                    advanced=True,
                    tooltip="Candidates at once: time and memory, not the draws.",
                ),
                inputs.feather(advanced=True),
                inputs.context(),
                io.Combo.Input(
                    "mask_edges",
                    options=[AS_PRESET, "binary", "soft"],
                    default=AS_PRESET,
                    optional=True,
                    advanced=True,
                    tooltip="binary: everything from 50 % grey on is edited. soft: greys mean how freely a pixel may change.",
                ),
                *inputs.samplers(),
                inputs.respacing(),
                inputs.class_choice(""),
            ],
            outputs=[
                io.Image.Output("images", display_name="images", tooltip="The candidates at the picture's own size, best first."),
                io.Image.Output("x0", display_name="x̂0", tooltip="The squares as the model painted them, at its size, in the same order."),
                io.String.Output(
                    "scores",
                    display_name="scores",
                    tooltip="A line for each: rank, candidate, CLIP distance, seam; and why, where guidance did nothing.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        ddpm: glue.LoadedDDPM,
        image: Tensor,
        mask: Tensor,
        prompt: glue.LoadedPrompt | None = None,
        steps: int = 0,
        strength: float = 0.75,
        seed: int = 0,
        candidates: int = 4,
        preset: str = "best",
        options: glue.LoadedGuidance | None = None,
        algorithm: str = "blended",
        batch: int = 4,
        feather: int = 0,
        context: float = 1.6,
        mask_edges: str = AS_PRESET,
        sampler: str = "ddpm",
        eta: float = 0.0,
        respacing: str = "",
        class_choice: str = "",
    ) -> io.NodeOutput:
        changes: dict[str, Any] = {
            "steps": respacing.strip() or (str(steps) if steps else PRESETS[preset].steps), "strength": strength, "seed": seed, "candidates": candidates, "algorithm": algorithm,
            "batch": batch, "feather": feather, "context": context, "sampler": sampler, "eta": eta,
        }  # fmt: skip
        if mask_edges != AS_PRESET:
            changes["mask_rule"] = mask_edges
        if class_choice.strip():
            changes["class_choice"] = inputs.class_of(class_choice)
        if options is not None:
            changes["guidance"] = options.options
        with glue.engine():
            chosen = resolve_options(preset, changes)
            picture, alpha = glue.pictures(image)
            areas = glue.masks(mask)
            count = max(len(picture), len(areas))
            of = inputs.rows_from(len(picture), count, "pictures")
            areas = areas[inputs.rows_from(len(areas), count, "masks")]
            perceptual = options.perceptual if options is not None else None
            if perceptual is None and chosen.guidance.needs_perceptual:
                perceptual = glue.managed_perceptual()
            if prompt is not None and not len(prompt.prompt):
                prompt = None
            clip = prompt.clip if prompt is not None else None
            size = ddpm.model.image_size
            glue.on_device(ddpm, clip, perceptual, pixels=min(batch, candidates) * size**2, options=chosen.guidance)
            ddpm.limits.forget()
            results = run(glue.models(ddpm, clip, perceptual), picture[of], areas, prompt.prompt if prompt is not None else None, chosen)
            images = [
                glue.image(result.picture(c), None if alpha is None else alpha[of[i]][None])
                for i, result in enumerate(results)
                for c in result.candidates
            ]
            squares = [glue.as_image(c.edited) for result in results for c in result.candidates]
            return io.NodeOutput(torch.cat(images), torch.cat(squares), scores(results))


def resolve_options(name: str, changes: dict[str, Any]) -> EditOptions:
    """The options of a preset with what the node sets; guidance that was wired in replaces the preset's as a whole."""
    guidance = changes.pop("guidance", None)
    options = preset(name, **changes)
    return options if guidance is None else replace(options, guidance=guidance)


class EditProgress:
    """One bar, with previews, for several edits one after the other."""

    def __init__(self, edits: int) -> None:
        self.edits = edits
        self.done = 0
        self.progress: glue.Progress | None = None

    def on_start(self, result: EditResult) -> None:
        """An edit begins."""
        self.result = result

    def on_step(self, step: Step) -> None:
        """A batch of it came one level lower; raises if the person pressed Cancel."""
        options = self.result.options
        if self.progress is None:
            self.progress = glue.Progress(self.edits * -(-options.candidates // options.batch) * step.total)
        self.done += 1
        self.progress.update(self.done, finished_frame(step.x0[:1].cpu(), self.result) * 2 - 1)


def run(models: Models, pictures: Tensor, areas: Tensor, prompt: Prompt | None, options: EditOptions) -> list[EditResult]:
    """One edit for each picture."""
    watch = EditProgress(len(pictures))
    results = []
    for picture, area in zip(pictures, areas, strict=True):
        mask = fit_mask(area[None], *picture.shape[-2:], soft=True)  # thresholded by the edit itself, as its options say
        results.append(edit_picture(picture[None], mask, prompt, models, options, watch.on_step, on_start=watch.on_start))
    return results


def scores(results: list[EditResult]) -> str:
    """What a person reads: a table for each picture, and the engine's notes."""
    parts = []
    for number, result in enumerate(results, 1):
        lines = [f"Picture {number}"] if len(results) > 1 else []
        if result.source_distance is not None:
            lines.append(f"before: CLIP distance {glue.text(result.source_distance)}")
        lines += [line(candidate) for candidate in result.candidates]
        parts.append("\n".join(lines + [glue.in_words_of_nodes(note) for note in result.notes]))
    return "\n\n".join(parts)


def line(candidate: Candidate) -> str:
    """'1. candidate 3: CLIP distance 0.712 (gain 0.105), seam 0.013'."""
    score = candidate.score
    distance = "" if score.clip_distance is None else f"CLIP distance {glue.text(score.clip_distance)} (gain {glue.text(score.gain)}), "
    return f"{candidate.rank}. candidate {candidate.index}: {distance}seam {glue.text(score.seam_energy)}"


class RankByCLIP(io.ComfyNode):
    """Pictures in the order of their fit to a prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendedRankByCLIP",
            display_name="Rank by CLIP",
            category=glue.CATEGORY,
            description="Sorts a batch of pictures by how well the masked part fits the prompt, best first; as the sampler ranks its candidates.",
            search_aliases=["sort images", "best of", "CLIP score", "pick best"],
            inputs=[
                io.Image.Input("images", tooltip="A batch, of any nodes."),
                glue.PROMPT.Input("prompt", tooltip="From Encode Prompt."),
                io.Mask.Input("mask", optional=True, tooltip="What counts. Not wired: the whole picture."),
                io.Int.Input("keep", default=0, min=0, max=4096, optional=True, tooltip="How many of the best to give out; 0: all."),
            ],
            outputs=[
                io.Image.Output("images", display_name="images", tooltip="Best first."),
                io.String.Output("scores", display_name="scores", tooltip="A line for each: rank, place in the batch, CLIP distance."),
            ],
        )

    @classmethod
    def execute(cls, images: Tensor, prompt: glue.LoadedPrompt, mask: Tensor | None = None, keep: int = 0) -> io.NodeOutput:
        with glue.engine():
            if not len(prompt.prompt):
                raise BlendedError("Rank by CLIP needs a prompt with text; an empty one says nothing about pictures.")
            colours, _ = glue.pictures(images)
            given = glue.optional_masks(mask)
            height, width = colours.shape[-2:]
            full = colours.new_ones(1, 1, height, width) if given is None else fit_mask(given, height, width, False)
            full = full[inputs.rows_from(len(full), len(colours), "masks")]
            clip = prompt.clip
            progress = glue.Progress(len(colours))
            distances: list[float | None] = []
            context = glue.on_device(None, clip, images_per_pass=VIEWS_AT_ONCE)
            size, at_once = clip.model.image_size, VIEWS_AT_ONCE
            for i, picture in enumerate(colours):
                region = region_around(full[i], size)
                seen = region.cut_mask(full[i : i + 1], size)
                look = partial(
                    clip_distance_of_views,
                    context.put(region.cut(picture[None], size) * 2 - 1),
                    context.put(seen),
                    clip.model,
                    prompt.prompt,
                )
                distance, at_once = fewer_at_once(lambda count, look=look: look(at_once=count), at_once, context, "views are looked at")
                distances.append(float(distance))
                progress.update(i + 1)
            order = ranking(distances)[: keep or None]
            table = "\n".join(f"{rank}. picture {i + 1}: CLIP distance {glue.text(distances[i])}" for rank, i in enumerate(order, 1))
            return io.NodeOutput(images[order], table)


class DemoScene(io.ComfyNode):
    """A picture of the embedded world, with a mask."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendedDemoScene",
            display_name="Demo Scene",
            category=glue.CATEGORY,
            description="A little scene that the embedded models know, and a mask to draw an object into: to try everything without any file.",
            search_aliases=["test image", "example picture", "sample scene"],
            inputs=[
                io.Combo.Input("background", options=list(BACKGROUNDS), default="meadow", optional=True, tooltip="What the scene shows."),
                io.Combo.Input(
                    "object",
                    options=["none", *OBJECTS],
                    default="none",
                    optional=True,
                    tooltip="An object in the middle, under the mask: to remove, or to replace.",
                ),
                io.Int.Input("width", default=64, min=16, max=2048, step=8, optional=True, tooltip="The models were trained at 64."),
                io.Int.Input("height", default=64, min=16, max=2048, step=8, optional=True, tooltip="The models were trained at 64."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=inputs.MAX_SEED,
                    control_after_generate=True,
                    optional=True,
                    tooltip="SeededRandom clouds, hills and stars.",
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="The scene."),
                io.Mask.Output("mask", display_name="mask", tooltip="An ellipse in the middle."),
            ],
        )

    @classmethod
    def execute(cls, background: str = "meadow", object: str = "none", width: int = 64, height: int = 64, seed: int = 0) -> io.NodeOutput:
        scene, mask = demo_scene(background, seed, width, height, None if object == "none" else object)
        return io.NodeOutput(torch.from_numpy(scene)[None].float() / 255, torch.from_numpy(mask[None, :, :, 0].copy()).float() / 255)
