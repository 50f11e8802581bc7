"""The method one node at a time: Noise Background, CLIP Guidance Step, Blend Latents, the loop around them, Final Paste."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder, is_link
from torch import Tensor

from ..blended_core.diffusion import DiffusionConfig
from ..blended_core.errors import BlendedError
from ..blended_core.mask import blend, final_paste, mask_at_level, mask_for_clip
from ..blended_core.options import EditOptions, GuidanceOptions
from ..blended_core.random import SeededRandom
from ..blended_core.region import region_around, resize
from ..blended_core.sample import guided_step, noise_background
from . import glue, inputs
from .latent import KEY, Latent, Level, Noisy, fit_mask, pack, same_level, shape_of, unpack


class NoiseBackground(io.ComfyNode):
    """A picture at a noise level."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        start = [
            glue.DDPM.Input("ddpm", tooltip="The model that will paint; it decides the size and the noise schedule."),
            io.Int.Input(
                "steps", default=100, min=1, max=4000, tooltip="Steps of the whole process from pure noise; more are slower and finer."
            ),
            io.Float.Input(
                "strength",
                default=0.75,
                min=0.01,
                max=1.0,
                step=0.01,
                tooltip="Share of the steps that is done. 1 begins with pure noise; lower keeps more of what is there.",
            ),
            # Without control_after_generate: inside a choice the page adds that widget again each time it builds the choice.
            io.Int.Input(
                "seed",
                default=0,
                min=0,
                max=inputs.MAX_SEED,
                tooltip="Of every draw in this edit: noise, views, classes. The same seed gives the same picture.",
            ),
            io.Int.Input("batch", default=1, min=1, max=64, tooltip="Candidates of each picture, made at once."),
            io.Mask.Input(
                "mask",
                optional=True,
                tooltip="White: edit. A square around it is cut out and edited, so small masks get all the pixels. Later nodes know it.",
            ),
            inputs.context(),
            io.Boolean.Input(
                "soft_mask",
                default=False,
                optional=True,
                advanced=True,
                tooltip="Greys of the mask mean how freely a pixel may change. Off: everything from 50 % grey on is edited.",
            ),
            inputs.respacing(),
        ]
        match = [
            io.Latent.Input(
                "latent", tooltip="A LATENT of CLIP Guidance Step: the picture is brought to its level, with its seed and region."
            )
        ]
        return io.Schema(
            node_id="BlendedNoiseBackground",
            display_name="Noise Background",
            category=glue.CATEGORY + "/steps",
            description=(
                "Brings a real picture to a noise level. start begins an edit; match brings the picture to the level of a step's result, as the "
                "background for Blend Latents."
            ),
            search_aliases=["add noise", "q_sample", "encode pixel latent", "start blended diffusion"],
            inputs=[
                io.Image.Input("image", tooltip="The picture to edit (start), or whose pixels the background takes (match); any size."),
                io.DynamicCombo.Input(
                    "mode",
                    options=[io.DynamicCombo.Option("start", start), io.DynamicCombo.Option("match", match)],
                    tooltip="start: begin an edit. match: the same level as another LATENT.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "latent", display_name="latent", tooltip="Pixels in −1..1 with noise; it knows its level, seed, region and mask."
                )
            ],
        )

    @classmethod
    def execute(cls, image: Tensor, mode: dict[str, Any]) -> io.NodeOutput:
        chosen = {k: v for k, v in mode.items() if k != "mode" and v is not None}  # what is not wired comes as None
        with glue.engine():
            picture, _ = glue.pictures(image)
            return io.NodeOutput(begin(picture, **chosen) if mode["mode"] == "start" else match(picture, **chosen))


def begin(
    picture: Tensor,
    ddpm: glue.LoadedDDPM,
    steps: int,
    strength: float,
    seed: int,
    batch: int,
    mask: Tensor | None = None,
    context: float = 1.6,
    soft_mask: bool = False,
    respacing: str = "",
) -> Latent:
    """The first LATENT of an edit: ``batch`` candidates of every picture [P, 3, H, W] in 0..1."""
    options = EditOptions(
        steps=respacing.strip() or str(steps), strength=strength, seed=seed, context=context, mask_rule="soft" if soft_mask else "binary"
    )
    height, width = picture.shape[-2:]
    given = glue.optional_masks(mask)
    full = None if given is None else fit_mask(given, height, width, soft_mask)
    if full is not None and len(full) > 1 and len(picture) == 1:
        picture = picture.expand(len(full), -1, -1, -1)
    used = picture.new_ones(1, 1, height, width) if full is None else full
    inputs.rows_from(len(used), len(picture), "masks")
    size = ddpm.model.image_size
    region = region_around(used, size, context, soft_mask)
    schedule = ddpm.model.config.respaced(options.steps)
    level = Level(
        ddpm.model.config, options.steps, schedule.start_index(strength), schedule.start_index(strength), seed, region, soft_mask,
        region.cut(picture, size) * 2 - 1, full,
    )  # fmt: skip
    of = [i for i in range(len(picture)) for _ in range(batch)]
    numbers = [i for _ in range(len(picture)) for i in range(batch)]
    x = noise_background(level.sources[of], level.index, schedule, SeededRandom(seed), numbers, "start")
    base = {}
    if full is not None:
        small = region.cut_mask(full, size, soft_mask)
        base["noise_mask"] = small if len(small) == 1 else small[of]
    return pack(glue.to_intermediate(x), level, tuple(of), tuple(numbers), base)


def match(picture: Tensor, latent: Latent) -> Latent:
    """A picture [1, P or B, 3, H, W] in 0..1 at the level of a LATENT."""
    noisy = unpack(latent, "Noise Background (match)")
    level = noisy.level
    if tuple(picture.shape[-2:]) != (level.region.height, level.region.width):
        raise BlendedError(
            f"the picture is {picture.shape[-1]}×{picture.shape[-2]} and the edit was begun with one of {level.region.width}×"
            f"{level.region.height}; scale it to that with Upscale Image."
        )
    sources = noisy.rows_of(level.region.cut(picture, level.size) * 2 - 1, "pictures").expand(len(noisy), -1, -1, -1)
    x = noise_background(sources, level.index, level.schedule, SeededRandom(level.seed), noisy.candidates)
    return noisy.moved(glue.to_intermediate(x.clone()), level.index)


class CLIPGuidanceStep(io.ComfyNode):
    """One denoising step towards the prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendedCLIPGuidanceStep",
            display_name="CLIP Guidance Step",
            category=glue.CATEGORY + "/steps",
            description=(
                "One step of the diffusion model, pulled by CLIP towards the prompt inside the mask. Blend its result with the noised background "
                "before the next step (Blend Latents); without a prompt it fills from the surroundings."
            ),
            search_aliases=["guided step", "CLIP guidance", "denoise step", "p_sample"],
            inputs=[
                glue.DDPM.Input("ddpm", tooltip="The model that the LATENT was begun with."),
                io.Latent.Input("latent", tooltip="From Noise Background (start), Denoise Loop Start or Blend Latents."),
                glue.PROMPT.Input("prompt", optional=True, tooltip="From Encode Prompt. Not wired, or empty: removal."),
                io.Mask.Input("mask", optional=True, tooltip="What CLIP sees. Not wired: the mask of Noise Background."),
                glue.GUIDANCE.Input("options", optional=True, tooltip="From Guidance Options. Not wired: those of the preset best."),
                io.Image.Input(
                    "source",
                    optional=True,
                    tooltip="Only for λ above 0 in the options: the picture whose background should stay. Not wired: the one that the edit began with.",
                ),
                *inputs.samplers(),
                inputs.class_choice("zero"),
                io.Combo.Input(
                    "ddim_guidance",
                    options=["matched", "score"],
                    default="matched",
                    optional=True,
                    advanced=True,
                    tooltip="How far CLIP moves a ddim step: as far as a ddpm step, or half as far by the score's formula, as the presets paper and official.",
                ),
            ],
            outputs=[
                io.Latent.Output("latent", display_name="latent", tooltip="One level lower: the foreground for Blend Latents."),
                io.Image.Output("x0", display_name="x̂0", tooltip="What the model thinks that the finished region looks like."),
            ],
        )

    @classmethod
    def execute(
        cls,
        ddpm: glue.LoadedDDPM,
        latent: Latent,
        prompt: glue.LoadedPrompt | None = None,
        mask: Tensor | None = None,
        options: glue.LoadedGuidance | None = None,
        source: Tensor | None = None,
        sampler: str = "ddpm",
        eta: float = 0.0,
        class_choice: str = "zero",
        ddim_guidance: str = "matched",
    ) -> io.NodeOutput:
        with glue.engine():
            noisy = unpack(latent, "CLIP Guidance Step")
            level = noisy.level
            if level.clean:
                raise BlendedError("CLIP Guidance Step got a clean LATENT: no noise is left to take away. Wire it to Final Paste.")
            check_process(level, ddpm)
            guidance = options.options if options is not None else GuidanceOptions()
            edit = EditOptions(
                steps=level.respacing, seed=level.seed, sampler=sampler, eta=eta, ddim_guidance=ddim_guidance, guidance=guidance, class_choice=inputs.class_of(class_choice),
                mask_rule="soft" if level.soft else "binary",
            )  # fmt: skip
            area = noisy.mask(glue.optional_masks(mask))
            guided = prompt is not None and len(prompt.prompt) > 0
            if area is None and guided:
                raise BlendedError(
                    "CLIP Guidance Step has a prompt and no mask, so it does not know where to draw; wire a MASK into Noise Background "
                    "(start) or into this node."
                )
            sources = noisy.sources
            if source is not None:
                given, _ = glue.pictures(source, "source")
                if tuple(given.shape[-2:]) != (level.region.height, level.region.width):
                    raise BlendedError(
                        f"the source is {given.shape[-1]}×{given.shape[-2]}; give one of {level.region.width}×{level.region.height}, as the edit's picture."
                    )
                sources = noisy.rows_of(level.region.cut(given, level.size) * 2 - 1, "sources").expand_as(sources)
            progress = glue.Progress(level.start + 1)
            done = level.start - level.index
            progress.update(done)
            clip = prompt.clip if guided else None
            perceptual = options.perceptual if options is not None else None
            context = glue.on_device(ddpm, clip, perceptual, pixels=len(noisy) * level.size**2, options=guidance)
            if not done:
                ddpm.limits.forget()
            seen = torch.ones(1, 1, level.size, level.size) if area is None else mask_for_clip(area, level.soft)
            step = guided_step(
                glue.models(ddpm, clip, perceptual), context.put(noisy.samples.clone()), level.index, level.schedule, edit,
                prompt.prompt if guided else None, context.put(seen), SeededRandom(level.seed), noisy.candidates, context.put(sources.clone()),
            )  # fmt: skip
            x, x0 = glue.to_intermediate(step.x), glue.to_intermediate(step.x0)
            shown = x0 if area is None else blend(x0, sources.to(x0), mask_for_clip(area, level.soft).to(x0))
            progress.update(done + 1, shown)
            return io.NodeOutput(noisy.moved(x, level.index - 1), glue.as_image(x0))


def check_process(level: Level, ddpm: glue.LoadedDDPM) -> None:
    """Raises BlendedError if a LATENT was noised for another process than the model knows."""
    ours, theirs = ddpm.model.config, level.process

    def noise(process: DiffusionConfig) -> str:
        return f"{process.schedule} in {process.steps} steps"

    if (ours.schedule, ours.steps) != (theirs.schedule, theirs.steps):
        raise BlendedError(
            f"the LATENT was noised for a model whose schedule is {noise(theirs)}, and this model's is {noise(ours)}; wire one Load DDPM "
            "into all nodes of the edit."
        )
    if level.size % ddpm.model.multiple_of:
        raise BlendedError(
            f"the LATENT is {level.size} pixels wide and this model needs a multiple of {ddpm.model.multiple_of}; wire one Load DDPM into all nodes of the edit."
        )


class BlendLatents(io.ComfyNode):
    """The step inside the mask, the real picture outside."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendedBlendLatents",
            display_name="Blend Latents",
            category=glue.CATEGORY + "/steps",
            description=(
                "Foreground inside the mask, background outside, at one noise level; two different levels are an error. LATENTs that know no level "
                "(of a VAE) are blended plainly."
            ),
            search_aliases=["composite latents", "masked blend", "blend at noise level", "latent composite masked"],
            inputs=[
                io.Latent.Input("foreground", tooltip="The result of CLIP Guidance Step."),
                io.Latent.Input("background", tooltip="The real picture at the same level: Noise Background in its mode match."),
                io.Mask.Input("mask", optional=True, tooltip="White: foreground. Not wired: the mask that the LATENT carries."),
            ],
            outputs=[io.Latent.Output("latent", display_name="latent", tooltip="For the next step, Denoise Loop End or Final Paste.")],
        )

    @classmethod
    def execute(cls, foreground: Latent, background: Latent, mask: Tensor | None = None) -> io.NodeOutput:
        with glue.engine():
            knows = [isinstance(latent.get(KEY), Level) for latent in (foreground, background)]
            if not any(knows):
                return io.NodeOutput(plain_blend(foreground, background, mask))
            if not all(knows):
                which = "background" if knows[0] else "foreground"
                raise BlendedError(
                    f"the {which} does not know its noise level and the other LATENT does, so they cannot be blended; bring the {which}'s picture "
                    "to the level with Noise Background (match)."
                )
            ours, other = unpack(foreground, "Blend Latents (foreground)"), unpack(background, "Blend Latents (background)")
            same_level(ours, other)
            area = ours.mask(glue.optional_masks(mask))
            if area is None:
                raise BlendedError("Blend Latents has no mask; wire a MASK into Noise Background (start) or into this node.")
            inputs.rows_from(len(other), len(ours), "background rows")
            level = ours.level
            weights = mask_at_level(area, level.index + 1, level.start, level.soft)
            x = blend(ours.samples, other.samples, weights.to(ours.samples))
            return io.NodeOutput(ours.moved(glue.to_intermediate(x), level.index))


def plain_blend(foreground: Latent, background: Latent, mask: Tensor | None) -> Latent:
    """A masked blend of LATENTs of any kind, at the foreground's shape."""
    a, b = foreground["samples"], background["samples"]
    if a.shape[1:] != b.shape[1:] or len(b) not in (1, len(a)):
        raise BlendedError(f"the foreground is {shape_of(a)} and the background {shape_of(b)}; both must have one shape.")
    values = mask if mask is not None else foreground.get("noise_mask")
    if values is None:
        raise BlendedError("Blend Latents has no mask; wire a MASK, or set one with Set Latent Noise Mask.")
    weights = values.reshape(-1, 1, *values.shape[-2:]).to(a)
    if weights.shape[-2:] != a.shape[-2:]:
        weights = F.interpolate(weights, size=tuple(a.shape[-2:]), mode="bilinear", align_corners=False)
    weights = weights.clamp(0, 1)[inputs.rows_from(len(weights), len(a), "masks")]
    return {**foreground, "samples": blend(a, b.to(a), weights.reshape(len(a), *[1] * (a.ndim - 3), *weights.shape[-2:]))}


class DenoiseLoopStart(io.ComfyNode):
    """Where each round of the loop begins."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendedDenoiseLoopStart",
            display_name="Denoise Loop Start",
            category=glue.CATEGORY + "/steps",
            description="The nodes between this and Denoise Loop End run once for every noise level, until the LATENT is clean.",
            search_aliases=["for loop", "while loop", "repeat steps"],
            inputs=[io.Latent.Input("latent", tooltip="From Noise Background (start).")],
            outputs=[
                io.FlowControl.Output("flow", display_name="flow", tooltip="To Denoise Loop End: marks what belongs to the loop."),
                io.Latent.Output("latent", display_name="latent", tooltip="The LATENT of this round, for CLIP Guidance Step."),
            ],
        )

    @classmethod
    def execute(cls, latent: Latent) -> io.NodeOutput:
        return io.NodeOutput("loop", latent)


class DenoiseLoopEnd(io.ComfyNode):
    """Where each round ends, and the next one begins."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendedDenoiseLoopEnd",
            display_name="Denoise Loop End",
            category=glue.CATEGORY + "/steps",
            description="Sends the LATENT round again until no noise is left, then gives it out.",
            search_aliases=["for loop", "while loop", "repeat steps"],
            enable_expand=True,
            hidden=[io.Hidden.dynprompt, io.Hidden.unique_id],
            inputs=[
                io.FlowControl.Input("flow", raw_link=True, tooltip="From Denoise Loop Start."),
                io.Latent.Input("latent", tooltip="The result of the round: from Blend Latents."),
            ],
            outputs=[io.Latent.Output("latent", display_name="latent", tooltip="Clean: for Final Paste.")],
        )

    @classmethod
    def execute(cls, flow: list[Any], latent: Latent) -> io.NodeOutput:
        with glue.engine():
            noisy = unpack(latent, "Denoise Loop End")
            if noisy.level.clean:
                return io.NodeOutput(latent)
            prompt, own = cls.hidden.dynprompt, cls.hidden.unique_id
            start = flow[0]
            if prompt.get_node(start)["class_type"] != "BlendedDenoiseLoopStart":
                raise BlendedError("flow of Denoise Loop End is not wired to a Denoise Loop Start; wire the two together.")
            before = prompt.get_node(start)["inputs"].get("latent")  # a link at first, then what the round before gave
            if isinstance(before, dict) and unpack(before, "Denoise Loop End").level.index <= noisy.level.index:
                raise BlendedError(
                    f"the loop does not come nearer to the picture: its round began and ended at {noisy.level}. A CLIP Guidance Step "
                    "belongs between Denoise Loop Start and Denoise Loop End."
                )
            inside = between(prompt, start, own)
            graph = GraphBuilder()
            # Short names: those of the round before carry its prefix already, and would double at every round.
            names = {node: "end" if node == own else str(i) for i, node in enumerate(inside)}
            for node, name in names.items():
                graph.node(prompt.get_node(node)["class_type"], name).set_override_display_id(prompt.get_display_node_id(node))
            for node, name in names.items():
                copy = graph.lookup_node(name)
                for key, value in prompt.get_node(node)["inputs"].items():
                    if is_link(value) and value[0] in names:
                        value = graph.lookup_node(names[value[0]]).out(value[1])
                    copy.set_input(key, value)
            graph.lookup_node(names[start]).set_input("latent", latent)
            return io.NodeOutput(graph.lookup_node("end").out(0), expand=graph.finalize())


def between(prompt: Any, start: str, end: str) -> list[str]:
    """The nodes of a loop: those that lead from start to end, both included."""
    feeds: dict[str, bool] = {start: True}

    def depends(node: str) -> bool:
        if node not in feeds:
            feeds[node] = False  # a graph has no cycles; this only guards against walking in one
            links = [value[0] for value in prompt.get_node(node)["inputs"].values() if is_link(value)]
            feeds[node] = any([depends(link) for link in links])
        return feeds[node]

    depends(end)
    return [node for node, inside in feeds.items() if inside]


class FinalPaste(io.ComfyNode):
    """The edit on the real picture, every other pixel untouched."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendedFinalPaste",
            display_name="Final Paste",
            category=glue.CATEGORY,
            description=(
                "Puts the edit into the original at its own size. Outside the mask the result is the original bit for bit. Takes a clean LATENT of "
                "this pack, or any edited IMAGE (of another inpainting node, say)."
            ),
            search_aliases=["paste back", "composite", "stitch", "restore unmasked pixels", "image composite masked"],
            inputs=[
                io.MultiType.Input(
                    "edited",
                    [io.Latent, io.Image],
                    tooltip="The clean LATENT of Denoise Loop End, or an edited IMAGE of the whole picture.",
                ),
                io.Image.Input("original", tooltip="The picture as it was; its size and its alpha are kept."),
                io.Mask.Input(
                    "mask", optional=True, tooltip="White: take the edit. Not wired: the mask that the LATENT carries; an IMAGE needs one."
                ),
                inputs.feather(),
                io.Boolean.Input(
                    "soft_mask",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="For an IMAGE: let the mask's greys fade the edit. Off: everything from 50 % grey on is taken.",
                ),
            ],
            outputs=[io.Image.Output("image", display_name="image", tooltip="At the original's size.")],
        )

    @classmethod
    def execute(
        cls, edited: Latent | Tensor, original: Tensor, mask: Tensor | None = None, feather: int = 0, soft_mask: bool = False
    ) -> io.NodeOutput:
        with glue.engine():
            picture, alpha = glue.pictures(original, "original")
            given = glue.optional_masks(mask)
            if isinstance(edited, dict):
                full, used, of, soft = from_latent(edited, picture, given)
            else:
                full, used, of, soft = from_image(edited, picture, given, soft_mask)
            pasted = final_paste(full, picture[of], used, soft=soft, feather=feather)
            return io.NodeOutput(glue.image(pasted, None if alpha is None else alpha[of]))


Pasted = tuple[Tensor, Tensor, list[int], bool]


def from_latent(latent: Latent, picture: Tensor, given: Tensor | None) -> Pasted:
    """(the edit at the original's size, its mask, the original of each row, whether the mask is soft)."""
    noisy = unpack(latent, "Final Paste")
    level, region = noisy.level, noisy.level.region
    if not level.clean:
        raise BlendedError(f"the LATENT at Final Paste is still noisy ({level}); let a Denoise Loop run it down first.")
    height, width = picture.shape[-2:]
    if (height, width) != (region.height, region.width):
        raise BlendedError(
            f"the original is {width}×{height} and the edit was made of a picture of {region.width}×{region.height}; wire the picture that "
            "went into Noise Background (start)."
        )
    if given is None:
        given = level.masks if level.masks is not None else of_noise_mask(noisy)
    if given is None:
        raise BlendedError("Final Paste has no mask; wire a MASK into Noise Background (start) or into this node.")
    used = noisy.rows_of(fit_mask(given, height, width, level.soft), "masks")
    of = list(noisy.pictures) if len(picture) == len(level.sources) else inputs.rows_from(len(picture), len(noisy), "originals")
    return region.put_back((noisy.samples + 1) / 2, picture[of]), used, of, level.soft


def of_noise_mask(noisy: Noisy) -> Tensor | None:
    """A noise mask that another node set, in the frame of the picture."""
    area, region = noisy.mask(None), noisy.level.region
    if area is None:
        return None
    return region.put_back(area, area.new_zeros(len(area), 1, region.height, region.width)).clamp(0, 1)


def from_image(edited: Tensor, picture: Tensor, given: Tensor | None, soft: bool) -> Pasted:
    """As :func:`from_latent`, of an IMAGE."""
    full, _ = glue.pictures(edited, "edited IMAGE")
    if given is None:
        raise BlendedError("Final Paste got an IMAGE and no mask; wire the MASK that says which part of it to take.")
    height, width = picture.shape[-2:]
    full = resize(full, (height, width))
    used = fit_mask(given, height, width, soft)
    count = max(len(full), len(picture), len(used))
    full = full[inputs.rows_from(len(full), count, "edited pictures")]
    return full, used[inputs.rows_from(len(used), count, "masks")], inputs.rows_from(len(picture), count, "originals"), soft
