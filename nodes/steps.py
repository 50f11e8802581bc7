"""The steps of Algorithm 2 as nodes: Noise Background, CLIP Guidance Step, Blend Latents."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from comfy_api.latest import io
from torch import Tensor

from ..blended_core.diffusion import DiffusionConfig
from ..blended_core.edit import prepare
from ..blended_core.errors import BlendedError
from ..blended_core.mask import EditMask, blend
from ..blended_core.options import MULTISTEP, EditOptions, GuidanceOptions
from ..blended_core.random import SeededRandom
from ..blended_core.sample import guided_step, noise_background, with_scale
from . import inputs
from .images import from_image, from_optional_mask, sample_to_image, to_intermediate
from .inputs import edit_option, row_indices
from .latent import KEY, EditState, Latent, check_same_level, fit_mask, mask_rule, pack, shape_of, unpack
from .memory import LoadedDDPM, LoadedGuidance, LoadedPrompt, edit_models, load_to_device
from .runtime import Progress, library_scope

NOISE, STEP, BLEND = "Noise Background", "CLIP Guidance Step", "Blend Latents"


class NoiseBackground(io.ComfyNode):
    """Noises an image to a level."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        start = [
            inputs.DDPM.Input("ddpm", tooltip="The diffusion model of the edit. It sets the size of the region and the noise schedule."),
            inputs.steps(default=100, min=1),
            edit_option("strength", optional=False),
            # Without control_after_generate: the web page adds that widget again each time it builds the inputs of a mode.
            edit_option("seed", optional=False),
            edit_option("batch", optional=False, default=1, min=1, tooltip="Number of candidates of each image. They are made at once."),
            io.Mask.Input(
                "mask",
                optional=True,
                tooltip="White: edit. A square region around the mask is cut out and edited at the model's size. The LATENT carries the mask.",
            ),
            edit_option("context", advanced=True),
            io.Boolean.Input(
                "soft_mask",
                default=False,
                optional=True,
                advanced=True,
                tooltip="Gray values of the mask set how freely a pixel may change. Off: everything from 50 % gray on is edited.",
            ),
            inputs.respacing(),
        ]
        match = [
            io.Latent.Input(
                "latent", tooltip="The LATENT of CLIP Guidance Step. The image is noised to its level, with its seed and region."
            )
        ]
        return io.Schema(
            node_id="BlendedNoiseBackground",
            display_name=NOISE,
            category=inputs.STEPS_CATEGORY,
            description=(
                "Noises an image to a level. Mode start begins an edit. Mode match noises the image to the level of a step's result, as the background "
                "for Blend Latents."
            ),
            search_aliases=["add noise", "q_sample", "encode pixel latent", "start blended diffusion"],
            inputs=[
                io.Image.Input("image", tooltip="The source image, of any size."),
                io.DynamicCombo.Input(
                    "mode",
                    options=[io.DynamicCombo.Option("start", start), io.DynamicCombo.Option("match", match)],
                    tooltip="start: begin an edit. match: noise the image to the level of another LATENT.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "latent", display_name="latent", tooltip="The noisy region in −1..1. It carries its level, seed, region and mask."
                )
            ],
        )

    @classmethod
    def execute(cls, image: Tensor, mode: dict[str, Any]) -> io.NodeOutput:
        values = {k: v for k, v in mode.items() if k != "mode" and v is not None}  # an unconnected input comes as None
        with library_scope(NOISE):
            rgb = from_image(image)
            return io.NodeOutput(start_edit(rgb, **values) if mode["mode"] == "start" else match_level(rgb, **values))


def start_edit(
    image: Tensor,
    ddpm: LoadedDDPM,
    steps: int,
    strength: float,
    seed: int,
    batch: int,
    mask: Tensor | None = None,
    context: float = 1.6,
    soft_mask: bool = False,
    respacing: str = "",
) -> Latent:
    """The first LATENT of an edit: ``batch`` candidates of every image [N, 3, H, W] in 0..1."""
    options = EditOptions(
        steps=respacing.strip() or str(steps), strength=strength, seed=seed, context=context, mask_rule=mask_rule(soft_mask)
    )
    given = from_optional_mask(mask)
    height, width = image.shape[-2:]
    masks = None if given is None else fit_mask(given, (height, width), soft_mask)
    if masks is not None and len(image) == 1:
        image = image.expand(len(masks), -1, -1, -1)
    used = EditMask(image.new_ones(1, 1, *image.shape[-2:]), soft_mask) if masks is None else masks
    row_indices(len(used), len(image), "masks")
    size = ddpm.model.image_size
    prepared = prepare(image, used, size, context=context)
    schedule = ddpm.model.config.respaced(options.steps)
    level = schedule.start_index(strength)
    area = None if masks is None else prepared.mask
    state = EditState(
        ddpm.model.config, options.steps, level, level, seed, prepared.region, soft_mask, prepared.source, masks, area=area
    )  # fmt: skip
    image_of = [i for i in range(len(image)) for _ in range(batch)]
    candidates = [i for _ in range(len(image)) for i in range(batch)]
    x = noise_background(prepared.source[image_of], level, schedule, SeededRandom(seed), candidates, "start")
    base = {}
    if masks is not None:
        base["noise_mask"] = prepared.mask.rows(image_of).values
    return pack(to_intermediate(x), state, tuple(image_of), tuple(candidates), base)


def match_level(image: Tensor, latent: Latent) -> Latent:
    """An image [1, N or B, 3, H, W] in 0..1, noised to the level of a LATENT."""
    noisy = unpack(latent, f"{NOISE} (match)")
    state = noisy.state
    x = noise_background(noisy.cut(image, "image"), state.level, state.schedule, SeededRandom(state.seed), noisy.candidates)
    return noisy.at(state.level, to_intermediate(x.clone()))


class CLIPGuidanceStep(io.ComfyNode):
    """One denoising step, guided by CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendedCLIPGuidanceStep",
            display_name=STEP,
            category=inputs.STEPS_CATEGORY,
            description=(
                "One denoising step of the diffusion model. CLIP guides it toward the prompt inside the mask. Before the next step, blend its result "
                "with the noised source image (Blend Latents). Without a prompt the masked part is filled in from its surroundings."
            ),
            search_aliases=["guided step", "CLIP guidance", "denoise step", "p_sample"],
            inputs=[
                inputs.DDPM.Input("ddpm", tooltip="The diffusion model that is connected to Noise Background (start)."),
                io.Latent.Input("latent", tooltip="The noisy LATENT, from Denoise Loop Start, Noise Background (start) or Blend Latents."),
                inputs.PROMPT.Input(
                    "prompt", optional=True, tooltip="The prompt, from Encode Prompt. Unconnected or empty: object removal."
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="The part of the image that CLIP sees. Unconnected: the mask of Noise Background."
                ),
                inputs.GUIDANCE.Input("options", optional=True, tooltip="From Guidance Options. Unconnected: the defaults of that node."),
                io.Image.Input(
                    "source",
                    optional=True,
                    tooltip="Used only if background_scale in the options is above 0, or by tone_match: the image whose background is kept. Unconnected: "
                    "the source image of the edit.",
                ),
                edit_option("sampler", default="ddpm", advanced=True),
                edit_option("eta", advanced=True),
                edit_option("class_choice", advanced=True),
                edit_option("ddim_guidance", advanced=True),
                edit_option("tone_match", default="off", advanced=True),
            ],
            outputs=[
                io.Latent.Output("latent", display_name="latent", tooltip="The LATENT one level lower: the foreground for Blend Latents."),
                io.Image.Output("x0", display_name="x̂0", tooltip="The model's prediction of the clean region."),
            ],
        )

    @classmethod
    def execute(
        cls,
        ddpm: LoadedDDPM,
        latent: Latent,
        prompt: LoadedPrompt | None = None,
        mask: Tensor | None = None,
        options: LoadedGuidance | None = None,
        source: Tensor | None = None,
        sampler: str = "ddpm",
        eta: float = 0.0,
        class_choice: str = "zero",
        ddim_guidance: str = "matched",
        tone_match: str = "off",
    ) -> io.NodeOutput:
        with library_scope(STEP):
            noisy = unpack(latent, STEP)
            state = noisy.state
            if state.clean:
                raise BlendedError(f"{STEP} got a clean LATENT, which has no noise to remove; connect it to Final Paste.")
            check_process(state, ddpm)
            guidance = with_scale(options.options if options is not None else GuidanceOptions(), ddpm.model)
            edit = EditOptions(
                steps=state.respacing, seed=state.seed, sampler=sampler, eta=eta, ddim_guidance=ddim_guidance, guidance=guidance,
                tone_match=tone_match, class_choice=inputs.parse_class(class_choice), mask_rule=mask_rule(state.soft),
            )  # fmt: skip
            given = noisy.seen_mask(from_optional_mask(mask), STEP)
            if prompt is not None and not len(prompt.prompt):
                prompt = None
            if given is None and prompt is not None:
                raise BlendedError(f"{STEP} has a prompt and no mask; connect a MASK to Noise Background (start) or to this node.")
            area = torch.ones(1, 1, state.size, state.size) if given is None else given.for_clip()
            blended = None if tone_match == "off" else noisy.region_mask(None, STEP)
            inside = None if blended is None else blended.at_level(state.level, state.start) > 0
            sources = noisy.sources if source is None else noisy.cut(from_image(source, "source"), "source")
            done = state.start - state.level
            progress = Progress(state.start + 1)
            progress.update(done)
            clip = prompt.clip if prompt is not None else None
            perceptual = options.perceptual if options is not None else None
            context = load_to_device(ddpm, clip, perceptual, len(noisy) * state.size**2, guidance)
            if not done:
                ddpm.limits.reset()
            step = guided_step(
                edit_models(ddpm, clip, perceptual, context), context.put(noisy.samples.clone()), state.level, state.schedule, edit,
                None if prompt is None else prompt.prompt, context.put(area), SeededRandom(state.seed), noisy.candidates,
                context.put(sources.clone()), previous=None if noisy.previous is None else context.put(noisy.previous.clone()),
                inside=None if inside is None else context.put(inside),
            )  # fmt: skip
            x0 = to_intermediate(step.x0)
            progress.update(done + 1, blend(x0, sources.to(x0), area.to(x0)))
            carried = x0 if sampler == MULTISTEP else None
            return io.NodeOutput(noisy.at(state.level - 1, to_intermediate(step.x), previous=carried), sample_to_image(x0))


def check_process(state: EditState, ddpm: LoadedDDPM) -> None:
    """Raises BlendedError if a LATENT was noised with another noise schedule than the model's, or for another size."""

    def schedule(process: DiffusionConfig) -> str:
        return f"{process.schedule} in {process.steps} steps"

    model, theirs = schedule(ddpm.model.config), schedule(state.process)
    if model != theirs:
        raise BlendedError(
            f"the LATENT was noised with the schedule {theirs}, and the schedule of this model is {model}; connect one Load DDPM to all nodes of the edit."
        )
    if state.size % ddpm.model.multiple_of:
        raise BlendedError(
            f"the LATENT is {state.size} pixels wide, and this model needs a multiple of {ddpm.model.multiple_of}; connect one Load DDPM to all nodes of "
            "the edit."
        )


class BlendLatents(io.ComfyNode):
    """Foreground inside the mask, background outside."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendedBlendLatents",
            display_name=BLEND,
            category=inputs.STEPS_CATEGORY,
            description=(
                "Takes the foreground inside the mask and the background outside. Both must be at the same noise level. LATENTs without a known level, "
                "such as those of a VAE, are blended as they are."
            ),
            search_aliases=["composite latents", "masked blend", "blend at noise level", "latent composite masked"],
            inputs=[
                io.Latent.Input("foreground", tooltip="The result of CLIP Guidance Step."),
                io.Latent.Input("background", tooltip="The source image at the same level, from Noise Background in mode match."),
                io.Mask.Input("mask", optional=True, tooltip="White: foreground. Unconnected: the mask that the LATENT carries."),
            ],
            outputs=[
                io.Latent.Output(
                    "latent", display_name="latent", tooltip="The blended LATENT, for the next step, Denoise Loop End or Final Paste."
                )
            ],
        )

    @classmethod
    def execute(cls, foreground: Latent, background: Latent, mask: Tensor | None = None) -> io.NodeOutput:
        with library_scope(BLEND):
            known = [isinstance(latent.get(KEY), EditState) for latent in (foreground, background)]
            if not any(known):
                return io.NodeOutput(plain_blend(foreground, background, mask))
            if not all(known):
                which, other = ("background", "foreground") if known[0] else ("foreground", "background")
                raise BlendedError(
                    f"the {which} has no known noise level and the {other} has one, so they cannot be blended; noise the image of the {which} to that "
                    f"level with {NOISE} (match)."
                )
            front, back = unpack(foreground, f"{BLEND} (foreground)"), unpack(background, f"{BLEND} (background)")
            check_same_level(front, back)
            given = from_optional_mask(mask)
            state = front.state
            # Final Paste needs the mask at full size: what the samples show of it is too coarse.
            carried = None if given is None else front.full_mask(given, BLEND)
            area = front.region_mask(None, BLEND) if carried is None else state.region.cut_mask(carried, state.size)
            if area is None:
                raise BlendedError(f"{BLEND} has no mask; connect a MASK to Noise Background (start) or to this node.")
            row_indices(len(back), len(front), "background rows")
            weights = area.at_level(state.level + 1, state.start).to(front.samples)
            blended = to_intermediate(blend(front.samples, back.samples, weights))
            return io.NodeOutput(front.at(state.level, blended, carried, front.previous))


def plain_blend(foreground: Latent, background: Latent, mask: Tensor | None) -> Latent:
    """A masked blend of LATENTs without a known level, of the foreground's shape."""
    a, b = foreground["samples"], background["samples"]
    if a.shape[1:] != b.shape[1:] or len(b) not in (1, len(a)):
        raise BlendedError(f"the foreground has shape {shape_of(a)} and the background {shape_of(b)}; give two of one shape.")
    values = mask if mask is not None else foreground.get("noise_mask")
    if values is None:
        raise BlendedError(f"{BLEND} has no mask; connect a MASK, or set one with Set Latent Noise Mask.")
    weights = values.reshape(-1, 1, *values.shape[-2:]).to(a)
    if weights.shape[-2:] != a.shape[-2:]:
        weights = F.interpolate(weights, size=tuple(a.shape[-2:]), mode="bilinear", align_corners=False)
    weights = weights.clamp(0, 1)[row_indices(len(weights), len(a), "masks")]
    return {**foreground, "samples": blend(a, b.to(a), weights.reshape(len(a), *[1] * (a.ndim - 3), *weights.shape[-2:]))}
